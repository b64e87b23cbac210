"""The masked transformer on the tokens of a causal tokenizer (Villegas et al. 2023, Phenaki)."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxvid import schema
from jaxvid.checks import at_least, below, between, choose, require
from jaxvid.data.transforms import normalize
from jaxvid.errors import UserError, within
from jaxvid.masking import commit, decoding, draws, schedules
from jaxvid.models.conditioning import Conditioner
from jaxvid.models.masked_transformer import MaskedTransformer
from jaxvid.models.tokenizer import FrozenTokenizer
from jaxvid.tasks import generating
from jaxvid.tasks.base import Generator
from jaxvid.tasks.windows import Carry, Stream

DTYPES = ("float32", "bfloat16", "float16")
LOSSES = ("masked", "all")
CRITICS = ("none", "self", "network")
CONDITIONS = ("label", "text", "negative_text")
LEVELS = 1024  # progresses of the mask schedule that training draws from
BINS = 10
MASK = {"schedule": str, "loss": str, "smoothing": float, "prefix": float, "images": float}
MASK |= {"commit": float}


class Task(Generator):
    """Train and sample a transformer that fills in masked tokens of clips.

    size, frames: pixels and frames of the training clips. window: frames that the network sees at
    once; of a longer clip, training takes as many from a random latent on, so that a stream can go
    on without limit. model: options of `models.masked_transformer.MaskedTransformer`. condition:
    the fields of `models.conditioning.Conditioner`, and drop, the probability of the null
    condition. mask: schedule, of `masking.schedules`; loss, of "masked" tokens or "all"; smoothing
    of labels; prefix, the share of clips whose first latents are known, as in a continuation;
    images, the share of steps on first latents alone, each an image; commit, the share of clips
    whose masked tokens are those of a padded clip where pixels are known (`masking.commit`).
    critic: "none", "self" (a head of the same network) or "network" (one of its own), which learns
    to tell drawn tokens from real ones and then ranks tokens in sampling. sampler: the fields of
    `masking.decoding.Sampler`, guidance (1 = none), and keep, the latents of a window that the next
    one is given. given: clean frames before the continuation that `evaluate` scores. tokenizer: a
    trained tokenizer with codes.
    """

    baselines = generating.BASELINES

    def __init__(
        self,
        *,
        size: int,
        frames: int,
        window: int,
        model: Mapping,
        condition: Mapping,
        mask: Mapping,
        critic: str,
        sampler: Mapping,
        given: int,
        tokenizer: FrozenTokenizer | None = None,
    ):
        remedy = "its tokens are what the network learns; name the folder of a tokenizer's run"
        require(tokenizer is not None, "tokenizer", "", remedy)
        self.tokenizer, self.frames, self.given = tokenizer, frames, given
        self.codes = tokenizer.codes
        remedy = "its latents have no codes; train one with fsq, vq, lfq or bsq"
        require(self.codes, "tokenizer", tokenizer.digest, remedy)
        at_least("frames", frames, 2)
        between("given", given, 1, frames - 1)
        between("window", window, 2, frames)
        latents = functools.partial(self._in_latents, function=tokenizer.latents_for_frames)
        self.latents, self.window = latents("frames", frames), latents("window", window)
        latents("given", given)
        self.grid = self._in_latents("size", size, tokenizer.grid)
        self._set_mask(mask, size)
        self.condition = dict(condition)
        schema.check("condition", {"drop": self.condition.pop("drop", None)}, {"drop": float})
        self.drop = condition["drop"]
        with within("condition"):
            between("drop", self.drop, 0, 1)
            self.conditioner = schema.build(Conditioner, self.condition)
        choose("critic", critic, CRITICS)
        self.critic = critic
        self._set_sampler(dict(sampler))
        with within("model"):
            choose("dtype", model.get("dtype"), DTYPES)
            options = {**model, "dtype": jnp.dtype(model["dtype"])}
            shared = dict(codes=self.codes, grid=self.grid)
            own = dict(**shared, critic=critic == "self")
            self.model = schema.build(MaskedTransformer, options, **own)
            self.critic_model = self.model.clone(critic=True, predicts=False)

    def _set_mask(self, mask, size):
        schema.check("mask", mask, MASK)
        with within("mask"):
            choose("schedule", mask["schedule"], schedules.SCHEDULES)
            choose("loss", mask["loss"], LOSSES)
            below("smoothing", mask["smoothing"], 0, 1)
            for share in ("prefix", "images", "commit"):
                between(share, mask[share], 0, 1)
            remedy = "pixels are known of whole clips; use task.window=data.frames, or 0"
            whole = self.window == self.latents
            require(whole or not mask["commit"], "commit", mask["commit"], remedy)
            remedy = "the tokens of this tokenizer are not cells of a frame; use 0"
            is_cells = self.grid == (size // self.tokenizer.tokenizer.network.patch,) * 2
            require(is_cells or not mask["commit"], "commit", mask["commit"], remedy)
        self.mask, self.size = dict(mask), (size, size)

    def _set_sampler(self, sampler):
        schema.check("sampler", sampler, {"guidance": float, "keep": int, schema.OPEN: None})
        self.guidance, self.keep = sampler.pop("guidance"), sampler.pop("keep")
        with within("sampler"):
            at_least("guidance", self.guidance, 0, at_most=generating.MAX_GUIDANCE)
            kind = self.condition["kind"]
            remedy = f"condition.kind={kind!r} leaves nothing to guide by; use 1"
            require(self.guidance == 1 or kind != "none", "guidance", self.guidance, remedy)
            between("keep", self.keep, 1, max(self.window - 1, 1))
            self.sampler = schema.build(decoding.Sampler, sampler)

    def _in_latents(self, field, value, function):
        """function(value) of the tokenizer; its UserError then names the field of this task."""
        try:
            return function(value)
        except UserError as error:
            raise UserError(f"{field}={value}: does not suit the tokenizer: {error}") from error

    def binding(self):
        """The digest of the tokenizer."""
        return {"tokenizer_digest": self.tokenizer.digest}

    def check(self, source):
        """Raise UserError for data without the condition, or with another tokenizer's latents."""
        generating.check_source(source, self.conditioner, self.tokenizer.digest)

    def split_frames(self, frames):
        """None, as mesh.seq cannot split a clip; UserError for frames that are no whole latents."""
        self._in_latents("frames", frames, self.tokenizer.latents_for_frames)

    def frozen(self):
        """The weights of the tokenizer."""
        return self.tokenizer.params

    def init(self, rng, batch):
        """(params, {}) for a batch of arrays or of their shapes; see `tasks.base.Task`."""
        B, W, N = batch["id"].shape[0], self.window, self.grid[0] * self.grid[1]
        rng_model, rng_context, rng_critic = jax.random.split(rng, 3)
        with within("condition"):
            cond = self.conditioner.arguments(batch, B)
            context = self.conditioner.init(rng_context, jnp.zeros(B, bool), **cond)
        context_BME = self.conditioner.apply(context, jnp.zeros(B, bool), **cond)
        inputs = jnp.zeros((B, W, N), jnp.int32), True, context_BME
        params = {
            "model": self.model.init(rng_model, *inputs)["params"],
            "conditioner": context.get("params", {}),
        }
        if self.critic == "network":
            params["critic"] = self.critic_model.init(rng_critic, *inputs)["params"]
        return params, {}

    def _ids(self, frozen, batch):
        """Tokens ids_BTN of a batch: cached ones if it has them, else those of its video."""
        if "tokens" in batch:
            return batch["tokens"]
        return self.tokenizer.tokens(frozen, normalize(batch["video"]))[0]

    def _context(self, params, drop_B, batch):
        cond = self.conditioner.arguments(batch, drop_B.shape[0])
        return self.conditioner.apply({"params": params["conditioner"]}, drop_B, **cond)

    def loss(self, params, batch, rng, *, step, frozen, extra):
        """Cross-entropy of masked tokens, or of all, and of the critic; see `tasks.base.Task`."""
        del step
        ids_BTN = jax.lax.stop_gradient(self._ids(frozen, batch))
        rng_kind, rng_drop, rng = jax.random.split(rng, 3)
        drop_B = jax.random.bernoulli(rng_drop, self.drop, (len(ids_BTN),))
        context_BME = self._context(params, drop_B, batch)

        def of_images():
            return self._loss(params, ids_BTN[:, :1], True, context_BME, None, rng)

        def of_clips():
            rng_place, rng_mask, rng_condition = jax.random.split(rng, 3)
            first = jax.random.randint(rng_place, (), 0, self.latents - self.window + 1)
            window_BWN = jax.lax.dynamic_slice_in_dim(ids_BTN, first, self.window, 1)
            known = self._condition(frozen, batch, rng_condition) if self.mask["commit"] else None
            return self._loss(params, window_BWN, first == 0, context_BME, known, rng_mask)

        share = self.mask["images"]
        if share in (0, 1):
            loss, metrics, weight = of_images() if share else of_clips()
        else:
            on_images = jax.random.bernoulli(rng_kind, share)
            loss, metrics, weight = jax.lax.cond(on_images, of_images, of_clips)
        return loss, (metrics, extra, weight)

    def _loss(self, params, ids_BTN, is_first, context_BME, known, rng):
        """(loss, metrics, number of targets) of windows. known: see `_condition`."""
        rng_mask, rng_prefix, rng_draw = jax.random.split(rng, 3)
        is_free_BTN = jnp.ones(ids_BTN.shape, bool)
        if self.mask["prefix"] and ids_BTN.shape[1] > 1:
            is_free_BTN = draws.after_prefix(rng_prefix, ids_BTN.shape, self.mask["prefix"])
        is_masked_BTN = self._draw_mask(rng_mask, is_free_BTN)
        fill_BTN, is_condition_BTN = self.codes, None
        if known is not None:
            fill_BTN = jnp.where(known[1], known[0], self.codes)
            is_condition_BTN = is_masked_BTN & known[1]
        inputs_BTN = jnp.where(is_masked_BTN, fill_BTN, ids_BTN)
        inputs = inputs_BTN, is_first, context_BME, is_condition_BTN
        logits_BTNPV, _ = self.model.apply({"params": params["model"]}, *inputs)
        error_BTN, is_right_BTN = self._errors(logits_BTNPV, ids_BTN)
        is_target_BTN = is_masked_BTN if self.mask["loss"] == "masked" else True
        is_target_BTN = jnp.broadcast_to(is_target_BTN, ids_BTN.shape)
        targets, masked = is_target_BTN.sum(), is_masked_BTN.sum()
        loss = (error_BTN * is_target_BTN).sum() / targets
        metrics = {"accuracy": (is_right_BTN & is_masked_BTN).sum() / masked}
        if self.critic != "none":
            error = self._critic_loss(
                params, logits_BTNPV, ids_BTN, is_masked_BTN, inputs, rng_draw
            )
            loss, metrics = loss + error, metrics | {"critic": error}
        return loss, metrics, targets

    def _errors(self, logits_BTNPV, ids_BTN):
        """(cross-entropy with smoothed labels, whether the likeliest token is right) [B, T, N]."""
        P, V = logits_BTNPV.shape[-2:]
        digits_BTNP = decoding.digits(ids_BTN, P, V)
        log_BTNPV = jax.nn.log_softmax(logits_BTNPV)
        own = jnp.take_along_axis(log_BTNPV, digits_BTNP[..., None], -1)[..., 0]
        smoothing = self.mask["smoothing"]
        error_BTNP = -((1 - smoothing) * own + smoothing * log_BTNPV.mean(-1))
        is_right_BTN = (logits_BTNPV.argmax(-1) == digits_BTNP).all(-1)
        return error_BTNP.sum(-1), is_right_BTN

    def _critic_loss(self, params, logits_BTNPV, ids_BTN, is_masked_BTN, inputs, rng):
        """Binary cross-entropy of which tokens of a clip are real (Lezama et al. 2022)."""
        drawn_BTNP = jax.random.categorical(rng, jax.lax.stop_gradient(logits_BTNPV))
        drawn_BTN = decoding.from_digits(drawn_BTNP, logits_BTNPV.shape[-1])
        filled_BTN = jnp.where(is_masked_BTN, drawn_BTN, ids_BTN)
        scores_BTN = self._scores(params, filled_BTN, *inputs[1:3])
        return optax.sigmoid_binary_cross_entropy(scores_BTN, ~is_masked_BTN).mean()

    def _scores(self, params, ids_BTN, is_first, context_BME):
        """The critic's logits that tokens are real [B, T, N]."""
        own = self.critic == "network"
        model, weights = (self.critic_model, "critic") if own else (self.model, "model")
        return model.apply({"params": params[weights]}, ids_BTN, is_first, context_BME)[1]

    def _draw_mask(self, rng, is_free_BTN):
        """A random mask over free tokens, whose share the schedule gives at a random progress."""
        B, T, N = is_free_BTN.shape
        rng_level, rng_order = jax.random.split(rng)
        shares_S = schedules.training_shares(self.mask["schedule"], LEVELS, T * N)
        level_B = jax.random.randint(rng_level, (B,), 0, LEVELS)
        return draws.masked_at(rng_order, is_free_BTN, jnp.asarray(shares_S)[level_B])

    def _condition(self, frozen, batch, rng):
        """(tokens of padded clips, whether known pixels reach them) [B, T, N]; see `commit`.

        Clips that have no condition are reached by none.
        """
        require("video" in batch, "mask.commit", self.mask["commit"], "needs video, not tokens")
        video_BTHWC, B = normalize(batch["video"]), len(batch["video"])
        rng_share, rng_kind = jax.random.split(rng)
        kind_B = jax.random.randint(rng_kind, (B,), 0, len(commit.KINDS))
        ids_BTN, is_known_BTN = self._conditioned(frozen, video_BTHWC, kind_B)
        has_B = jax.random.bernoulli(rng_share, self.mask["commit"], (B,))
        return ids_BTN, is_known_BTN & has_B[:, None, None]

    def _conditioned(self, frozen, video_BTHWC, kind_B):
        """(tokens of the clips padded as their kind says, whether known pixels reach them)."""
        every = [self.known(kind) for kind in commit.KINDS]
        cells = np.stack([commit.cells(c.is_known_THW, self.latents, self.grid) for c in every])
        table = commit.stacked(every)
        chosen = jax.tree.map(lambda field: jnp.asarray(field)[kind_B], table)
        ids_BTN, _ = self.tokenizer.tokens(frozen, commit.padded(video_BTHWC, chosen))
        return jax.lax.stop_gradient(ids_BTN), jnp.asarray(cells)[kind_B]

    def evaluate(self, params, batch, rng, *, frozen):
        """Held-out quality of filling in and of continuing, per example.

        loss_by_level [B, 10]: cross-entropy of masked tokens of the first window, with the middle
        of each tenth of the tokens masked. accuracy [B]: at half of the tokens. psnr, ssim: see
        `generating.continuation_scores`.
        """
        rng_mask, rng_sample = jax.random.split(rng)
        ids_BWN = self._ids(frozen, batch)[:, : self.window]
        B = len(ids_BWN)
        context_BME = self._context(params, jnp.zeros(B, bool), batch)

        def score(share):
            all_BWN = jnp.ones(ids_BWN.shape, bool)
            is_masked_BWN = draws.masked_at(rng_mask, all_BWN, jnp.full(B, share))
            inputs_BWN = jnp.where(is_masked_BWN, self.codes, ids_BWN)
            inputs = {"params": params["model"]}, inputs_BWN, True, context_BME
            error_BWN, is_right_BWN = self._errors(self.model.apply(*inputs)[0], ids_BWN)
            masked_B = is_masked_BWN.sum((1, 2))
            found = error_BWN * is_masked_BWN, is_right_BWN & is_masked_BWN
            return tuple(x.sum((1, 2)) / masked_B for x in found)

        loss_LB, accuracy_LB = jax.lax.map(score, (np.arange(BINS, dtype=np.float32) + 0.5) / BINS)
        metrics = {"loss_by_level": loss_LB.T, "accuracy": accuracy_LB[BINS // 2]}
        first_frames = batch["video"][:, : self.given]
        cond = {**batch, "num": B, "first_frames": first_frames}
        frames = batch["video"].shape[1]
        video = self.sample(params, rng_sample, cond, frozen=frozen, frames=frames)
        return metrics | generating.continuation_scores(video, batch["video"], self.given)

    def pool(self, scores):
        """The scores with one blend for all clips; see `generating.pool`."""
        return generating.pool(scores)

    def sample(self, params, rng, cond, *, frozen, frames=None):
        """Video float32 [B, frames, H, W, 3] in [-1, 1]; see `tasks.base.Task`."""
        stream = self.stream(params, rng, cond, frozen=frozen, frames=frames or self.frames)
        return self.decode(frozen, jnp.concatenate(list(stream), axis=1))[0]

    def fill(self, params, rng, cond, kind: str, *, frozen) -> jax.Array:
        """Clips that are completed from what a kind of `masking.commit` knows of cond["video"].

        video: uint8 [B, T, H, W, 3] with the frames of a training clip. Known pixels are those of
        the video. Returns float32 [B, T, H, W, 3] in [-1, 1]. Raises UserError for an unknown kind
        and for a model that was trained without conditions of pixels.
        """
        choose("fill", kind, commit.KINDS)
        remedy = "training had no conditions of pixels; train with task.mask.commit=0.5"
        require(self.mask["commit"], "fill", kind, remedy)
        frames = cond["video"].shape[1]
        remedy = f"fills in clips of {self.frames} frames; give as many"
        require(frames == self.frames, "frames", frames, remedy)
        arrays = {name: cond[name] for name in ("label", "text", "video") if name in cond}
        return self._fill(params, rng, arrays, frozen, kind=kind)

    @functools.partial(jax.jit, static_argnames=("self", "kind"))
    def _fill(self, params, rng, cond, frozen, *, kind):
        video_BTHWC = normalize(cond["video"])
        B = len(video_BTHWC)
        kind_B = jnp.full(B, commit.KINDS.index(kind))
        known = self._conditioned(frozen, video_BTHWC, kind_B)
        is_free_BTN, contexts = jnp.ones(known[0].shape, bool), self._embed(params, cond, num=B)
        ids_BTN = self._generate(params, rng, contexts, known[0], is_free_BTN, True, known)
        filled, _ = self.decode(frozen, ids_BTN)
        return jnp.where(self.known(kind).is_known_THW[..., None], video_BTHWC, filled)

    def known(self, kind: str) -> commit.Condition:
        """What a kind of `masking.commit` knows of a training clip."""
        return commit.condition(kind, self.frames, self.size, self.given)

    def stream(self, params, rng, cond, *, frozen, frames=None, carry=None):
        """A `Stream`; see `tasks.base.Generator`. Its latents are ids [B, 1, N].

        The network fills in one window after another. A window begins with the last `keep` latents
        of the one before. One compiled program serves all windows. A switch drops the latents that
        are finished and were not yielded; the next window begins with those that were.
        """
        total = self.tokenizer.latents_for_frames(frames or self.frames)
        remedy = "training saw only first windows of clips; train with data.frames > task.window"
        within_window = total <= self.window or self.window < self.latents
        require(within_window, "frames", frames or self.frames, remedy)
        first = None
        if carry is None:
            contexts = self._contexts(params, cond)
            first = self._given(frozen, cond)
            carry = self._start(cond["num"], contexts, first)

        def step(carry):
            ids_BWN, first, known = self._place(carry)
            rng_window = jax.random.fold_in(rng, first + known)
            inputs = carry.contexts, ids_BWN, known, first == 0
            ids_BWN = self._advance(params, rng_window, *inputs)
            return carry._replace(ids_BWN=ids_BWN, first=first, count=self.window)

        return Stream(step, carry, total, first, functools.partial(self._contexts, params))

    def check_switch(self, frame, *, given, frames):
        """UserError unless a latent ends before this frame; see `tasks.base.Generator`."""
        del given, frames
        self._in_latents("frame", frame, self.tokenizer.latents_for_frames)

    def _given(self, frozen, cond):
        """The ids [B, P, N] of the first frames, None without any."""
        return self.tokens(frozen, cond["first_frames"]) if "first_frames" in cond else None

    @functools.partial(jax.jit, static_argnames="self")
    def tokens(self, frozen, video_u8):
        """The ids [B, T, N] of video uint8 [B, F, H, W, 3]."""
        return self.tokenizer.tokens(frozen, normalize(video_u8))[0]

    def _start(self, B, contexts, given_BPN):
        """The Carry of a stream that begins with given latents, the last of them if many."""
        W, N = self.window, self.grid[0] * self.grid[1]
        ids_BWN, P = jnp.zeros((B, W, N), jnp.int32), 0
        if given_BPN is not None:
            P = given_BPN.shape[1]
            ids_BWN = ids_BWN.at[:, : min(P, W)].set(given_BPN[:, max(P - W, 0) :])
        return Carry(contexts, ids_BWN, max(P - W, 0), min(P, W), P)

    def _place(self, carry):
        """(ids_BWN of the next window, its first latent, how many of its latents are known)."""
        if carry.count < self.window:
            return carry.ids_BWN, carry.first, carry.count
        moved = self.window - self.keep
        return jnp.roll(carry.ids_BWN, -moved, axis=1), carry.first + moved, self.keep

    def _contexts(self, params, cond):
        """(context of the condition, of none or of a negative text), each None without any."""
        arrays = {name: cond[name] for name in CONDITIONS if name in cond}
        return self._embed(params, arrays, num=cond["num"])

    @functools.partial(jax.jit, static_argnames=("self", "num"))
    def _embed(self, params, cond, *, num):
        drop_B = jnp.zeros(num, bool)
        null_BME = self._context(params, ~drop_B, cond)
        if "negative_text" in cond:
            null_BME = self._context(params, drop_B, {"text": cond["negative_text"]})
        return self._context(params, drop_B, cond), null_BME

    @functools.partial(jax.jit, static_argnames="self")
    def _advance(self, params, rng, contexts, ids_BWN, known, is_first):
        is_free_BWN = jnp.broadcast_to(jnp.arange(self.window)[:, None] >= known, ids_BWN.shape)
        return self._generate(params, rng, contexts, ids_BWN, is_free_BWN, is_first, None)

    def _generate(self, params, rng, contexts, ids_BTN, is_free_BTN, is_first, known):
        """ids_BTN with all free tokens generated. known: as of `_conditioned`, or None."""
        B, shape = len(ids_BTN), ids_BTN.shape
        fill_BTN = jnp.full(shape, self.codes)
        if known is not None:
            fill_BTN = jnp.where(known[1], known[0], self.codes)
        weights = {"params": params["model"]}

        def predict(ids_BL, is_masked_BL):
            ids_BTN, is_condition_BTN = ids_BL.reshape(shape), None
            if known is not None:
                is_condition_BTN = is_masked_BL.reshape(shape) & known[1]
            return self._guided(
                lambda *arguments: self.model.apply(weights, *arguments)[0],
                (ids_BTN, is_first),
                contexts,
                is_condition_BTN,
            ).reshape(B, -1, self.model.parts, self.model.values)

        def score(ids_BL):
            return self._guided(
                functools.partial(self._scores, params), (ids_BL.reshape(shape), is_first), contexts
            ).reshape(B, -1)

        flat = (x.reshape(B, -1) for x in (ids_BTN, fill_BTN, is_free_BTN))
        rng_B = jax.vmap(functools.partial(jax.random.fold_in, rng))(jnp.arange(B))
        critic = None if self.critic == "none" else score
        return decoding.decode(predict, *flat, rng_B, self.sampler, critic).reshape(shape)

    def _guided(self, apply, inputs, contexts, is_condition_BTN=None):
        """apply(ids, is_first, context, ..) under guidance, in one batch of twice the clips."""
        (ids_BTN, is_first), others = inputs, ()
        context_BME, null_BME = contexts
        if self.guidance == 1:
            if is_condition_BTN is not None:
                others = (is_condition_BTN,)
            return apply(ids_BTN, is_first, context_BME, *others)
        if is_condition_BTN is not None:
            others = (jnp.concatenate([is_condition_BTN] * 2),)
        both = jnp.concatenate([context_BME, null_BME])
        pair = jnp.split(apply(jnp.concatenate([ids_BTN] * 2), is_first, both, *others), 2)
        return decoding.guided(*pair, self.guidance)

    @functools.partial(jax.jit, static_argnames="self")
    def decode(self, frozen, z_BTNC, state=None):
        """The next latents of a stream, ids [B, t, N] -> (video in [-1, 1], state)."""
        z_BTNZ = self.tokenizer.from_stored(frozen, z_BTNC)
        video, state = self.tokenizer.decode(frozen, z_BTNZ, self.grid, state)
        return jnp.clip(video, -1, 1), state
