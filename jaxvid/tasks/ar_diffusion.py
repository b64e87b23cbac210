"""AR-Diffusion: video diffusion whose noise never decreases along the clip (Sun et al. 2025)."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.checks import at_least, between, choose, divides, positive, require
from jaxvid.data.transforms import normalize
from jaxvid.diffusion import guidance, samplers, timesteps
from jaxvid.diffusion.frame_schedules import FrameSchedule, make_frame_schedule
from jaxvid.diffusion.noise import make_noise_schedule
from jaxvid.errors import UserError, within
from jaxvid.metrics import quality
from jaxvid.mixers import make_mixer
from jaxvid.models.conditioning import Conditioner
from jaxvid.models.dit import DiT
from jaxvid.models.pixels import PixelTokenizer
from jaxvid.models.tokenizer import VideoTokenizer
from jaxvid.tasks import streaming
from jaxvid.tasks.base import Generator

TIMESTEPS = {
    "fopp": timesteps.fopp,
    "iid": timesteps.iid,
    "uniform": timesteps.uniform,
    "full_sequence": timesteps.full_sequence,
}
DTYPES = ("float32", "bfloat16", "float16")
MEMORIES = ("cache", "none", "window")
CONDITIONS = ("label", "text", "first_frames")
NOISE_BINS = 10


class Task(Generator):
    """Train and sample a causal diffusion transformer with one noise level per frame.

    size, frames: pixels and frames of the training clips. model: options of `models.dit.DiT`.
    noise: options of `diffusion.noise.make_noise_schedule`. prediction, weight, snr_clip: see
    `diffusion.noise.NoiseSchedule`. timesteps: how training draws the noise levels of a clip
    (`diffusion.timesteps`). clean_prefix: probability that a clip begins with clean frames, which
    are condition and not target. train_frames: most frames of a clip that a step trains on; of a
    longer clip it takes as many from a random frame on, but a `tokenizer` needs whole clips.
    condition: kind, tokens, width, num_classes (`models.conditioning`), and drop, the probability
    of the null condition. sampler: steps, schedule, s, block
    (`diffusion.frame_schedules.make_frame_schedule`), guidance, eta, end (`diffusion.samplers`) and
    memory ("cache", "none" or "window"). given: clean frames before the continuation that
    `evaluate` scores. patch: pixels on a side of a token; without effect if there is a `tokenizer`.

    All fields count video frames, the window of `model.mixer` too. Only its sinks and the schedules
    of `sampler` count latent frames.
    """

    def __init__(
        self,
        *,
        size: int,
        frames: int,
        model,
        patch: int,
        noise,
        prediction: str,
        weight: str,
        snr_clip: float,
        timesteps: str,
        clean_prefix: float,
        condition,
        sampler,
        given: int,
        train_frames: int | None = None,
        tokenizer: VideoTokenizer | None = None,
    ):
        choose("timesteps", timesteps, TIMESTEPS)
        positive("snr_clip", snr_clip)
        between("clean_prefix", clean_prefix, 0, 1)
        at_least("frames", frames, 2)
        between("given", given, 1, frames - 1)
        # Runs of earlier versions have no field `train_frames`.
        self.train_frames = frames if train_frames is None else min(train_frames, frames)
        at_least("train_frames", self.train_frames, 1)
        self.size, self.frames, self.given = size, frames, given
        self.prediction, self.weight, self.snr_clip = prediction, weight, snr_clip
        self.draw_timesteps, self.clean_prefix = TIMESTEPS[timesteps], clean_prefix
        # Runs of earlier versions have no field `end`.
        self.condition, self.sampler = dict(condition), {"end": "clean", **sampler}
        self.drop = self.condition.pop("drop")
        with within("condition"):
            between("drop", self.drop, 0, 1)
            self.conditioner = Conditioner(**self.condition)
        with within("noise"):
            self.noise = make_noise_schedule(**noise)
        self.noise.weight(np.zeros(1, np.int32), weight, prediction)  # raises for unknown names
        if tokenizer is None:
            divides("patch", patch, size, "size")
            tokenizer = PixelTokenizer(patch)
        self.tokenizer = tokenizer
        self.grid = self._in_latents("size", self.tokenizer.grid, size)
        for name, value in (("frames", frames), ("given", given)):
            self._in_latents(name, self._latents, value)
        is_possible = self.train_frames == frames or isinstance(tokenizer, PixelTokenizer)
        remedy = f"a tokenizer encodes whole clips; use {frames}"
        require(is_possible, "train_frames", self.train_frames, remedy)
        self.model = self._make_model(model)
        self._check_sampler()
        options = (self.sampler[name] for name in ("eta", "end"))
        self.solver = samplers.Solver(self.noise, prediction, *options)
        self.schedule(self._latents(frames))

    def _make_model(self, options) -> DiT:
        options = {**options, "mixer": dict(options["mixer"])}
        mixer = options["mixer"]
        with within("model"):
            choose("dtype", options["dtype"], DTYPES)
            if mixer.get("window"):
                mixer["window"] = self._in_latents("mixer.window", self._latents, mixer["window"])
            model = DiT(grid=self.grid, **{**options, "dtype": jnp.dtype(options["dtype"])})
            self.temporal_mixer = make_mixer(mixer, width=model.width, heads=model.heads)
        return model

    def _check_sampler(self):
        options, kind = self.sampler, self.condition["kind"]
        with within("sampler"):
            choose("memory", options["memory"], MEMORIES)
            choose("end", options["end"], samplers.ENDS)
            levels = self.noise.num_steps
            remedy = f"there are {levels} noise levels; use 1 to {levels - 1}"
            require(1 <= options["steps"] < levels, "steps", options["steps"], remedy)
            between("eta", options["eta"], 0, 1)
            at_least("guidance", options["guidance"], 0)
            require(
                options["guidance"] == 1 or kind != "none",
                "guidance",
                options["guidance"],
                "condition.kind='none' leaves nothing to guide by; use 1",
            )
            require(
                self.temporal_mixer.streams or options["memory"] != "cache",
                "memory",
                options["memory"],
                "this mixer sees later frames and cannot stream; use none",
            )

    def _latents(self, frames: int) -> int:
        return self.tokenizer.latents_for_frames(frames)

    def _in_latents(self, field, function, value):
        """function(value) of the tokenizer; its UserError then names the field of this task."""
        try:
            return function(value)
        except UserError as error:
            raise UserError(f"{field}={value}: does not suit the tokenizer: {error}") from error

    @property
    def window(self) -> int:
        """Latent frames that may be noisy at once: the attention window, else a training clip."""
        return self.temporal_mixer.window or self._latents(self.frames)

    def schedule(self, frames: int) -> FrameSchedule:
        """The frame schedule for this many latent frames; UserError if there is none."""
        options = self.sampler
        with within("sampler"):
            return make_frame_schedule(
                options["schedule"],
                frames,
                options["steps"],
                s=options["s"],
                block=options["block"],
                window=self.window,
            )

    def binding(self):
        """The digest of a trained tokenizer."""
        return {"tokenizer_digest": self.tokenizer.digest}

    def check(self, source):
        """Raise UserError for data without the condition, or with another tokenizer's latents."""
        own = self.tokenizer.digest
        if source.tokenizer not in ("", own):
            raise UserError(
                f"tokenizer: is {own or 'none'}, but data.path holds latents of the tokenizer "
                f"{source.tokenizer}; name the folder they were encoded with, or encode again with "
                "python -m jaxvid.tokenize"
            )
        kind, rows = self.condition["kind"], self.condition["num_classes"]
        with within("condition"):
            classes = source.num_classes
            remedy = f"the data has {classes} classes; use {classes} or more"
            require(kind != "class" or classes <= rows, "num_classes", rows, remedy)
            remedy = "the data has no captions; use class or none"
            require(kind != "text" or source.captions, "kind", kind, remedy)

    def split_frames(self, frames):
        """Latent frames of a clip in training; see `tasks.base.Task`."""
        return min(self._latents(frames), self._latents(self.train_frames))

    def init(self, rng, batch):
        """(params, {}) for a batch of arrays or of their shapes; see `tasks.base.Task`."""
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
        """The weights of the tokenizer."""
        return self.tokenizer.params

    def _encode(self, frozen, video_u8):
        """uint8 video -> clean latents z_BTNZ float32, without gradient."""
        z_BTNZ, _ = self.tokenizer.encode(frozen, normalize(video_u8))
        return jax.lax.stop_gradient(z_BTNZ.astype(jnp.float32))

    def _clean(self, frozen, batch):
        """Clean latents z_BTNZ of a batch: cached ones if it has them, else those of its video."""
        for name in ("latents", "tokens"):
            if name in batch:
                return jax.lax.stop_gradient(self.tokenizer.from_stored(frozen, batch[name]))
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
        if self.train_frames < self.frames:
            rng, rng_part = jax.random.split(rng)
            z_BTNC = _random_part(rng_part, z_BTNC, self.train_frames)
        B, T = z_BTNC.shape[:2]
        rng_t, rng_prefix, rng_eps, rng_drop = jax.random.split(rng, 4)
        t_BT = self.draw_timesteps(rng_t, B, T, self.noise.num_steps)
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
        return loss, ({"mse": (error_BT * is_target_BT).sum() / targets}, extra, targets)

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

        The noise of a frame depends on `rng` and its index alone. Raises UserError if the schedule
        cannot sample this many frames.
        """
        arrays = {name: value for name, value in cond.items() if name in CONDITIONS}
        total = self._latents(frames or self.frames)
        return self._sample(params, rng, arrays, frozen, batch=cond["num"], total=total)

    @functools.partial(jax.jit, static_argnames=("self", "batch", "total"))
    def _sample(self, params, rng, cond, frozen, *, batch, total):
        predict, state, given_BPNC = self._open(params, cond, frozen, batch, total)
        z_BTNC = streaming.sample_clip(
            predict,
            state,
            given_BPNC,
            rng,
            solver=self.solver,
            schedule=self.schedule(total - given_BPNC.shape[1]),
            memory=self.sampler["memory"],
            window=self.window,
        )
        return self.decode(frozen, z_BTNC)[0]

    def stream(self, params, rng, cond, *, frozen, frames=None) -> Iterator[jax.Array]:
        """Yield the latents [B, t, N, C] of a video as its frames finish, `first_frames` first.

        Decoded in turn by `decode` they are the video of `sample` with memory "cache". The work
        between two yields is one call of one compiled program, however long the video.
        """
        with within("sampler"):
            memory, remedy = self.sampler["memory"], "a stream reads its cache; use cache"
            require(memory == "cache", "memory", memory, remedy)
        arrays = {name: value for name, value in cond.items() if name in CONDITIONS}
        total = self._latents(frames or self.frames)
        given_BPNC, x_BFNC, state = self._begin(
            params, rng, arrays, frozen, batch=cond["num"], total=total
        )
        P = given_BPNC.shape[1]
        schedule = self.schedule(total - P)
        if P:
            yield given_BPNC

        def step(x_BFNC, state, rows):
            return self._advance(params, rng, x_BFNC, state, rows, schedule=schedule, given=P)

        yield from streaming.finished_frames(step, x_BFNC, state, schedule)

    @functools.partial(jax.jit, static_argnames="self")
    def decode(self, frozen, z_BTNC, state=None):
        """The next latents of a stream -> (video float32 [B, t, H, W, 3] in [-1, 1], state)."""
        video, state = self.tokenizer.decode(frozen, z_BTNC, self.grid, state)
        return jnp.clip(video, -1, 1), state

    @functools.partial(jax.jit, static_argnames=("self", "batch", "total"))
    def _begin(self, params, rng, cond, frozen, *, batch, total):
        """(given latents, noise of the others, state that has read the condition and the given)."""
        predict, state, given_BPNC = self._open(params, cond, frozen, batch, total)
        schedule = self.schedule(total - given_BPNC.shape[1])
        options = dict(solver=self.solver, schedule=schedule)
        return given_BPNC, *streaming.begin(predict, state, given_BPNC, rng, **options)

    @functools.partial(
        jax.jit,
        static_argnames=("self", "schedule", "given"),
        donate_argnames=("x_BFNC", "state"),
    )
    def _advance(self, params, rng, x_BFNC, state, rows, *, schedule, given):
        predict = self._predict(params, given + schedule.frames)
        options = dict(solver=self.solver, schedule=schedule, given=given)
        return streaming.advance(predict, x_BFNC, state, rows, rng, **options)

    def _predict(self, params, total, context_BME=None):
        """The network of a stream of `total` latent frames, with guidance, as samplers call it."""
        mixer = dict(self.model.mixer)
        if not self.temporal_mixer.constant_state:
            # Nothing leaves a window as long as the stream, and a scan needs a cache of one size.
            mixer["window"] = total
        model = self.model.clone(mixer=mixer)

        def predict(x_BTNC, t_BT, state):
            if self.temporal_mixer.streams:
                return self._apply(params, x_BTNC, t_BT, state=state, model=model)
            # A mixer that sees the future cannot continue: every call reads everything.
            return self._apply(params, x_BTNC, t_BT, context_BME, model=model)[0], state

        scale = self.sampler["guidance"]
        return predict if scale == 1 else guidance.classifier_free(predict, scale)

    def _open(self, params, cond, frozen, batch, total):
        """(predict, state that has read the context alone, clean latents of `first_frames`)."""
        drop_B = jnp.zeros(batch, bool)
        context_BME = self._context(params, drop_B, cond)
        copies = 1
        if self.sampler["guidance"] != 1:
            copies = 2
            context_BME = jnp.concatenate([context_BME, self._context(params, ~drop_B, cond)])
        empty_BTNC = jnp.zeros((batch, 0, self.grid[0] * self.grid[1], self.tokenizer.channels))
        given_BPNC = empty_BTNC
        if "first_frames" in cond:
            given_BPNC = self._encode(frozen, cond["first_frames"])
        x_BTNC = jnp.concatenate([empty_BTNC] * copies)
        t_BT = jnp.zeros((batch * copies, 0), jnp.int32)
        _, state = self._apply(params, x_BTNC, t_BT, context_BME)
        return self._predict(params, total, context_BME), state, given_BPNC


def _random_part(rng, x_BTNC, frames):
    """`frames` successive frames of each clip, from a frame drawn for each."""
    B, T = x_BTNC.shape[:2]
    first_B = jax.random.randint(rng, (B,), 0, T - frames + 1)
    return jax.vmap(lambda x, first: jax.lax.dynamic_slice_in_dim(x, first, frames))(
        x_BTNC, first_B
    )


def _conditions(conditioner, batch, size):
    """The arguments of the conditioner that a batch or a sampling condition holds."""
    if conditioner.kind == "class":
        return {"label_B": batch["label"] if "label" in batch else jnp.zeros(size, jnp.int32)}
    if conditioner.kind == "text":
        if "text" not in batch:
            raise UserError(
                "condition.kind='text': the data has no captions; set data.text_tokens and "
                "data.text_width, or task.condition.kind=none"
            )
        return {"text_BME": batch["text"]}
    return {}
