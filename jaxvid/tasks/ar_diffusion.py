"""AR-Diffusion: video diffusion whose noise never decreases along the clip (Sun et al. 2025)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.data.transforms import normalize
from jaxvid.diffusion import guidance, samplers, schedulers, schedules, timesteps
from jaxvid.errors import UserError, within
from jaxvid.metrics import quality
from jaxvid.mixers import check as check_mixer
from jaxvid.models.conditioning import KINDS, Conditioner
from jaxvid.models.dit import ARRANGEMENTS, DiT
from jaxvid.models.patches import Patches

TIMESTEPS = ("fopp", "iid", "uniform", "full_sequence")
DTYPES = ("float32", "bfloat16", "float16")
MEMORIES = ("cache", "none", "window")
CONDITIONS = ("label", "text", "first_frames")
NOISE_BINS = 10


class Task:
    """Train and sample a causal diffusion transformer with one noise level per frame.

    size, frames: of the training clips, pixels and frames. model: options of `models.dit.DiT`.
    noise: options of `schedules.make`. prediction, weight, snr_clip: see
    `schedules.NoiseSchedule`. timesteps: how training noises the frames of a clip
    (`diffusion.timesteps`). clean_prefix: probability that a clip begins with clean frames, which
    are condition and not target.
    condition: kind, tokens, width, num_classes (`models.conditioning`) and drop, the probability
    of the null condition. sampler: steps, schedule, s, block (`schedulers.make`), guidance, eta,
    memory ("cache", "none" or "window"). given: clean frames before the continuation that
    `evaluate` scores. patch: pixels, for the tokenizer that learns nothing; `tokenizer` is any
    other with the members of `models.patches.Patches` and `params`, its frozen weights, such as
    `models.tokenizer.FrozenTokenizer`. Frames are of video everywhere here, the window of
    `model.mixer` included; its sinks and the schedules of `sampler` count latent frames.
    """

    sharding_rules = (
        (
            r"/(q|k|v|gate|decay_out|up|modulation|time_in|time_out|context|down)/kernel",
            ("fsdp", "tensor"),
        ),
        (r"/out/kernel", ("tensor", "fsdp")),
        (r"/(q|k|v|gate|decay_out|up)/bias", ("tensor",)),
    )

    def __init__(
        self,
        *,
        size,
        frames,
        model,
        patch,
        noise,
        prediction,
        weight,
        snr_clip,
        timesteps,
        clean_prefix,
        condition,
        sampler,
        given,
        tokenizer=None,
    ):
        self.size, self.frames, self.given = size, frames, given
        self.prediction, self.weight, self.snr_clip = prediction, weight, snr_clip
        self.timesteps, self.clean_prefix = timesteps, clean_prefix
        self.condition, self.sampler = dict(condition), dict(sampler)
        self.drop = self.condition.pop("drop")
        with within("task.noise", noise):
            self.noise = schedules.make(**noise)
        _check(self, patch if tokenizer is None else 1, model)
        self.tokenizer = Patches(patch) if tokenizer is None else tokenizer
        self.grid = self._fits("size", self.tokenizer.grid, size)
        mixer = dict(model["mixer"])
        if mixer.get("window"):
            mixer["window"] = self._fits("model.mixer.window", self._latents, mixer["window"])
        for name in ("frames", "given"):
            self._fits(name, self._latents, getattr(self, name))
        options = {"mixer": mixer, "dtype": jnp.dtype(model["dtype"])}
        self.model = DiT(grid=self.grid, **{**model, **options})
        self.conditioner = Conditioner(**self.condition)
        self.solver = samplers.Solver(self.noise, prediction, self.sampler["eta"])
        self.schedule(self._latents(frames))

    def _latents(self, frames):
        return self.tokenizer.latents_for_frames(frames)

    def _fits(self, field, function, value):
        """function(value) of the tokenizer, whose UserError then names the field."""
        try:
            return function(value)
        except UserError as error:
            raise UserError(
                f"task.{field}={value}: does not suit the tokenizer: {error}"
            ) from error

    @property
    def window(self):
        """Latent frames that may be noisy at once: the attention window, else a training clip."""
        return self.model.mixer.get("window") or self._latents(self.frames)

    def schedule(self, frames):
        """The frame schedule for this many latent frames; raises UserError where it cannot be."""
        options = self.sampler
        with within("task.sampler", options):
            return schedulers.make(
                options["schedule"],
                frames,
                options["steps"],
                s=options["s"],
                block=options["block"],
                window=self.window,
            )

    def check(self, source):
        """Raise UserError where the clips have more classes than the table, or no captions.

        Or where they are the latents of another tokenizer.
        """
        cached = getattr(source, "tokenizer", None)
        own = getattr(self.tokenizer, "digest", None)
        if cached not in (None, own):
            raise UserError(
                f"data.path: holds latents of the tokenizer {cached}, task.tokenizer is "
                f"{own or 'none'}; name the folder they were encoded with, or encode again with "
                "python -m jaxvid.data.tokenize"
            )
        kind, rows = self.condition["kind"], self.condition["num_classes"]
        if kind == "class" and source.num_classes > rows:
            raise UserError(
                f"task.condition.num_classes={rows}: the data has {source.num_classes} classes; "
                f"use {source.num_classes} or more"
            )
        if kind == "text" and not source.captions:
            raise UserError(
                "task.condition.kind='text': the data has no captions; use class or none"
            )

    def split_frames(self, frames):
        """Latent frames of a clip; see `tasks.base.Task`."""
        return self._latents(frames)

    def init(self, rng, batch):
        """(params, extra) for a batch of arrays or of their shapes; see `tasks.base.Task`."""
        B, T = batch["id"].shape[0], self._latents(self.frames)
        H, W = self.grid
        rng_model, rng_context = jax.random.split(rng)
        cond = _conditions(self.conditioner, batch, B)
        context = self.conditioner.init(rng_context, jnp.zeros(B, bool), **cond)
        context_BME = self.conditioner.apply(context, jnp.zeros(B, bool), **cond)
        x_BTNC = jnp.zeros((B, T, H * W, self.tokenizer.channels))
        model = self.model.init(rng_model, x_BTNC, jnp.zeros((B, T), jnp.int32), context_BME)
        return {"model": model["params"], "conditioner": context.get("params", {})}, {}

    def frozen(self):
        """The tokenizer's weights."""
        return getattr(self.tokenizer, "params", {})

    def _encode(self, frozen, video_u8):
        """uint8 video -> clean latents z_BTNZ float32, never trained through."""
        z_BTNZ, _ = self.tokenizer.encode(frozen, normalize(video_u8))
        return jax.lax.stop_gradient(z_BTNZ.astype(jnp.float32))

    def _clean(self, frozen, batch):
        """Clean latents z_BTNZ of a batch: those it brings, else those of its video."""
        for name in ("latents", "tokens"):
            if name in batch:
                return jax.lax.stop_gradient(self.tokenizer.cached(frozen, batch[name]))
        return self._encode(frozen, batch["video"])

    def _context(self, params, drop_B, batch):
        cond = _conditions(self.conditioner, batch, drop_B.shape[0])
        return self.conditioner.apply({"params": params["conditioner"]}, drop_B, **cond)

    def _apply(self, params, x_BTNC, t_BT, context_BME=None, state=None, model=None):
        model = model or self.model
        return model.apply({"params": params["model"]}, x_BTNC, t_BT, context_BME, state)

    def loss(self, params, batch, rng, *, step, frozen, extra):
        """Weighted squared error of the prediction, averaged over the frames that are targets."""
        del step
        z_BTNC = self._clean(frozen, batch)
        B, T = z_BTNC.shape[:2]
        rng_t, rng_prefix, rng_eps, rng_drop = jax.random.split(rng, 4)
        t_BT = getattr(timesteps, self.timesteps)(rng_t, B, T, self.noise.num_steps)
        t_BT, prefix_B = timesteps.clean_prefix(rng_prefix, t_BT, self.clean_prefix)
        is_target_BT = jnp.arange(T) >= prefix_B[:, None]

        eps_BTNC = jax.random.normal(rng_eps, z_BTNC.shape)
        x_BTNC = self.noise.add_noise(z_BTNC, eps_BTNC, t_BT)
        x_BTNC = jnp.where(is_target_BT[:, :, None, None], x_BTNC, z_BTNC)
        drop_B = jax.random.bernoulli(rng_drop, self.drop, (B,))
        prediction_BTNC, _ = self._apply(params, x_BTNC, t_BT, self._context(params, drop_B, batch))

        target_BTNC = self.noise.target(z_BTNC, eps_BTNC, t_BT, self.prediction)
        error_BT = jnp.square(prediction_BTNC - target_BTNC).mean((-2, -1))
        weight_BT = self.noise.weight(t_BT, self.weight, self.prediction, self.snr_clip)
        targets = is_target_BT.sum()
        loss = (weight_BT * error_BT * is_target_BT).sum() / targets
        return loss, ({"mse": (error_BT * is_target_BT).sum() / targets}, extra)

    def evaluate(self, params, batch, rng, *, frozen):
        """Held-out quality of denoising and of continuing, per example.

        loss_by_level [B, 10]: squared error of x0 with all frames at the middle of each tenth of
        the timesteps. psnr, ssim [B, F] of the continuation of the first `given` frames, and the
        same of repeating the last of them (`*_copy_last`); NaN at the given frames.
        """
        rng_eps, rng_sample = jax.random.split(rng)
        z_BTNC = self._clean(frozen, batch)
        B, T = z_BTNC.shape[:2]
        eps_BTNC = jax.random.normal(rng_eps, z_BTNC.shape)
        context_BME = self._context(params, jnp.zeros(B, bool), batch)

        def denoise(t):
            t_BT = jnp.full((B, T), t)
            x_BTNC = self.noise.add_noise(z_BTNC, eps_BTNC, t_BT)
            prediction_BTNC, _ = self._apply(params, x_BTNC, t_BT, context_BME)
            x0_BTNC, _ = self.noise.split(prediction_BTNC, x_BTNC, t_BT, self.prediction)
            return jnp.square(x0_BTNC - z_BTNC).mean((1, 2, 3))

        middle = (np.arange(NOISE_BINS) + 0.5) / NOISE_BINS * self.noise.num_steps
        metrics = {"loss_by_level": jax.lax.map(denoise, middle.astype(np.int32)).T}

        first_frames = batch["video"][:, : self.given]
        cond = {**batch, "num": B, "first_frames": first_frames}
        F = batch["video"].shape[1]
        video = self.sample(params, rng_sample, cond, frozen=frozen, frames=F)
        truth = normalize(batch["video"])
        copied = jnp.repeat(truth[:, self.given - 1 : self.given], F, axis=1)
        is_scored_F = jnp.arange(F) >= self.given
        for name, metric in (("psnr", quality.psnr), ("ssim", quality.ssim)):
            for suffix, guess in (("", video), ("_copy_last", copied)):
                metrics[name + suffix] = jnp.where(is_scored_F, metric(guess, truth), jnp.nan)
        return metrics

    def sample(self, params, rng, cond, *, frozen, frames=None):
        """Video float32 [B, frames, H, W, 3] in [-1, 1]; see `tasks.base.Task`.

        The noise of a frame depends on `rng` and its index alone. Raises UserError where the
        schedule cannot sample this many frames.
        """
        arrays = {name: value for name, value in cond.items() if name in CONDITIONS}
        return self._sample(params, rng, arrays, frozen, cond["num"], frames or self.frames)

    @functools.partial(jax.jit, static_argnums=(0, 5, 6))
    def _sample(self, params, rng, cond, frozen, batch, frames):
        total = self._latents(frames)
        predict, start, given_BPNC = self._open(params, cond, frozen, batch, total)
        P = given_BPNC.shape[1]
        x_BFNC = self._noise(rng, batch, P, total)
        options = dict(solver=self.solver, schedule=self.schedule(total - P))
        memory = self.sampler["memory"]
        if memory == "cache":
            _, state = predict(given_BPNC, jnp.zeros((batch, P), jnp.int32), start)
            x_BFNC, _ = samplers.cached(predict, x_BFNC, state, rng, given=P, **options)
        else:
            window = self.window if memory == "window" else None
            options |= dict(given_BPNC=given_BPNC, window=window)
            x_BFNC = samplers.uncached(predict, x_BFNC, start, rng, **options)
        return self.decode(frozen, jnp.concatenate([given_BPNC, x_BFNC], axis=1))[0]

    def stream(self, params, rng, cond, *, frozen, frames=None):
        """Yield the latents [B, t, N, C] of a video as its frames finish, `first_frames` first.

        Decoded in turn by `decode` they are the video of `sample` with memory "cache". The work
        between two pieces is one call of one compiled program, however long the video.
        """
        arrays = {name: value for name, value in cond.items() if name in CONDITIONS}
        batch = cond["num"]
        total = self._latents(frames or self.frames)
        given_BPNC, x_BFNC, state = self._begin(params, rng, arrays, frozen, batch, total)
        P = given_BPNC.shape[1]
        schedule = self.schedule(total - P)
        if P:
            yield given_BPNC
        for rows, done in samplers.pieces(samplers.plan(schedule)):
            x_BFNC, state = self._advance(params, rng, x_BFNC, state, rows, schedule, P)
            yield x_BFNC[:, done]

    @functools.partial(jax.jit, static_argnums=0)
    def decode(self, frozen, z_BTNC, state=None):
        """The next latents of a stream -> (video float32 [B, t, H, W, 3] in [-1, 1], state)."""
        video, state = self.tokenizer.decode(frozen, z_BTNC, self.grid, state)
        return jnp.clip(video, -1, 1), state

    @functools.partial(jax.jit, static_argnums=(0, 5, 6))
    def _begin(self, params, rng, cond, frozen, batch, total):
        """(given latents, noise of the others, state that has read the condition and the given)."""
        predict, start, given_BPNC = self._open(params, cond, frozen, batch, total)
        P = given_BPNC.shape[1]
        _, state = predict(given_BPNC, jnp.zeros((batch, P), jnp.int32), start)
        return given_BPNC, self._noise(rng, batch, P, total), state

    @functools.partial(jax.jit, static_argnums=(0, 6, 7), donate_argnums=(3, 4))
    def _advance(self, params, rng, x_BFNC, state, rows, schedule, given):
        predict = self._predict(params, given + schedule.frames)
        return samplers.advance(
            predict,
            x_BFNC,
            state,
            rows,
            rng,
            solver=self.solver,
            plan=samplers.plan(schedule),
            levels=self.noise.levels(schedule.sample_steps),
            given=given,
        )

    def _predict(self, params, total, context_BME=None):
        """The network of a stream of `total` latent frames, with guidance, as samplers call it."""
        mixer = dict(self.model.mixer)
        if "window" in mixer and mixer["window"] is None:
            # Nothing leaves a window as long as the stream, and a scan needs a cache of one size.
            mixer["window"] = total
        model = self.model.clone(mixer=mixer)

        def predict(x_BTNC, t_BT, state):
            if mixer.get("mask", "causal") == "causal":
                return self._apply(params, x_BTNC, t_BT, state=state, model=model)
            # What sees the future cannot be continued: it reads everything anew in every call.
            return self._apply(params, x_BTNC, t_BT, context_BME, model=model)[0], state

        scale = self.sampler["guidance"]
        return predict if scale == 1 else guidance.classifier_free(predict, scale)

    def _open(self, params, cond, frozen, batch, total):
        """(predict, state that has read the context alone, clean latents of `first_frames`)."""
        nobody_B = jnp.zeros(batch, bool)
        context_BME = self._context(params, nobody_B, cond)
        copies = 1
        if self.sampler["guidance"] != 1:
            copies = 2
            context_BME = jnp.concatenate([context_BME, self._context(params, ~nobody_B, cond)])
        empty_BTNC = jnp.zeros((batch, 0, self.grid[0] * self.grid[1], self.tokenizer.channels))
        given_BPNC = empty_BTNC
        if "first_frames" in cond:
            given_BPNC = self._encode(frozen, cond["first_frames"])
        x_BTNC = jnp.concatenate([empty_BTNC] * copies)
        t_BT = jnp.zeros((batch * copies, 0), jnp.int32)
        _, state = self._apply(params, x_BTNC, t_BT, context_BME)
        return self._predict(params, total, context_BME), state, given_BPNC

    def _noise(self, rng, batch, given, total):
        """Initial noise of the frames given .. total - 1."""
        frame_F = np.arange(given, total)
        shape = (batch, total - given, self.grid[0] * self.grid[1], self.tokenizer.channels)
        return samplers.frame_noise(
            rng, frame_F, np.full_like(frame_F, self.noise.num_steps), shape
        )


def _conditions(conditioner, batch, size):
    """The arguments of the conditioner that a batch or a sampling condition holds."""
    if conditioner.kind == "class":
        return {"label_B": batch["label"] if "label" in batch else jnp.zeros(size, jnp.int32)}
    if conditioner.kind == "text":
        if "text" not in batch:
            raise UserError(
                "task.condition.kind='text': the data has no captions; set data.text_tokens and "
                "data.text_width, or task.condition.kind=none"
            )
        return {"text_BME": batch["text"]}
    return {}


def _check(task, patch, model):
    """Raise UserError for settings that cannot work, before anything is compiled."""
    condition, sampler, mixer = task.condition, task.sampler, model["mixer"]

    def choose(field, value, choices):
        if value not in choices:
            raise UserError(f"task.{field}={value!r}: unknown; use one of {', '.join(choices)}")

    def require(holds, message):
        if not holds:
            raise UserError(f"task.{message}")

    choose("timesteps", task.timesteps, TIMESTEPS)
    choose("condition.kind", condition["kind"], KINDS)
    choose("sampler.memory", sampler["memory"], MEMORIES)
    choose("model.arrangement", model["arrangement"], ARRANGEMENTS)
    choose("model.dtype", model["dtype"], DTYPES)
    floors = {"patch": (patch, 1), "frames": (task.frames, 2)}
    floors |= {f"model.{name}": (model[name], 1) for name in ("width", "depth", "heads")}
    for name, (value, low) in floors.items():
        require(value >= low, f"{name}={value}: must be at least {low}")
    check_mixer("task.model.mixer", mixer, model["heads"])
    size, width, heads = task.size, model["width"], model["heads"]
    require(
        width * model["mlp_ratio"] >= 1,
        f"model.mlp_ratio={model['mlp_ratio']}: leaves width={width} no hidden unit; use 4",
    )
    with within("task", ("prediction", "weight")):
        task.noise.weight(np.zeros(1, np.int32), task.weight, task.prediction)
    levels = task.noise.num_steps
    require(
        1 <= sampler["steps"] < levels,
        f"sampler.steps={sampler['steps']}: there are {levels} noise levels; use 1 to {levels - 1}",
    )
    require(
        0 <= sampler["eta"] <= 1,
        f"sampler.eta={sampler['eta']}: a share of fresh noise; use 0 (DDIM) to 1 (ancestral)",
    )
    require(
        size % patch == 0,
        f"patch={patch}: does not divide size={size}; use a divisor of {size}",
    )
    require(
        width % heads == 0 and width // heads % 2 == 0,
        f"model.heads={heads}: does not divide width={width} into even heads; "
        f"use a divisor of {width // 2}",
    )
    require(
        0 <= task.drop <= 1,
        f"condition.drop={task.drop}: not a probability; use 0 to 1",
    )
    require(
        0 <= task.clean_prefix <= 1,
        f"clean_prefix={task.clean_prefix}: not a probability; use 0 to 1",
    )
    require(task.snr_clip > 0, f"snr_clip={task.snr_clip}: must be positive; use 5")
    require(
        0 < task.given < task.frames,
        f"given={task.given}: frames before the continuation; use 1 to {task.frames - 1}",
    )
    require(
        sampler["guidance"] == 1 or condition["kind"] != "none",
        f"sampler.guidance={sampler['guidance']}: condition.kind='none' gives no guide; use 1",
    )
    require(
        mixer.get("mask", "causal") == "causal" or sampler["memory"] != "cache",
        f"sampler.memory='cache': mask={mixer.get('mask')!r} sees later frames; use memory=none",
    )
