"""AR-Diffusion: video diffusion whose noise never decreases along the clip (Sun et al. 2025)."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.core import FrozenDict

from jaxvid import schema
from jaxvid.checks import at_least, between, choose, positive, require
from jaxvid.data.transforms import MAX_FRAMES, normalize
from jaxvid.diffusion import guidance, resampling, samplers, shortcut, timesteps, training_clip
from jaxvid.diffusion.frame_schedules import FrameSchedule, make_frame_schedule
from jaxvid.diffusion.layouts import FORCED, parse_layout
from jaxvid.diffusion.noise import make_noise_schedule
from jaxvid.diffusion.resampling import Resampling
from jaxvid.diffusion.shortcut import Shortcut
from jaxvid.errors import UserError, within
from jaxvid.layers import masks
from jaxvid.mixers import Stack, skip, through_window
from jaxvid.models.conditioning import Conditioner
from jaxvid.models.dit import DiT
from jaxvid.models.pixels import PixelTokenizer
from jaxvid.models.tokenizer import VideoTokenizer
from jaxvid.tasks import generating, streaming
from jaxvid.tasks.base import Generator

TIMESTEPS = {
    "fopp": timesteps.fopp,
    "iid": timesteps.iid,
    "uniform": timesteps.uniform,
    "full_sequence": timesteps.full_sequence,
}
DTYPES = ("float32", "bfloat16", "float16")
MEMORIES = ("cache", "none", "window")
CONDITIONS = ("label", "text", "negative_text", "first_frames")
NOISE_BINS = 10
SAMPLER = {
    **{"steps": int, "schedule": str, "s": float, "block": int},
    **{"guidance": float, "eta": float, "end": str, "memory": str},
    "history": {"guidance": float, "level": float, "window": int},
}
NO_HISTORY_GUIDANCE = FrozenDict(guidance=1.0, level=0.0, window=0)


class Task(Generator):
    """Train and sample a causal diffusion transformer with one noise level per frame.

    size, frames: pixels and frames of the training clips. model: options of `models.dit.DiT`.
    noise: options of `diffusion.noise.make_noise_schedule`. prediction, weight, snr_clip: see
    `diffusion.noise.NoiseSchedule`. timesteps: how training draws the noise levels of a clip
    (`diffusion.timesteps`) where noisy frames read each other; frames that are teacher-forced do
    not, and draw theirs independently. layout: which frames of a clip are noisy and what they read
    (`diffusion.layouts`). A batch draws whether its noisy frames read each other, clean frames or
    nothing, and a clip draws its prefix.
    train_frames: most frames of a clip that a step trains on; of a longer clip it takes as many
    from a random frame on (`training_clip.part`), but a `tokenizer` needs whole clips.
    condition: the fields of `models.conditioning.Conditioner`, and drop, the probability of the
    null condition. history_dropout: the probability that a batch begins at a random frame of
    its clips, which keeps its position and has no past, and that a clip has independent noise
    levels, so that frames read noisier ones; history guidance needs both. sampler: steps, schedule,
    s, block (`diffusion.frame_schedules.make_frame_schedule`), guidance, eta, end
    (`diffusion.samplers`), memory ("cache", "none" or "window") and history: guidance, the scale
    (`diffusion.guidance.history_terms`) of a past that is noised to the share `level` of the noise
    levels and seen through a `window`, 0 for that of the mixer. The condition is dropped together
    with that past. given: clean frames before the continuation that `evaluate` scores. shortcut:
    finest, share, after (`diffusion.shortcut.Shortcut`). resampling: share, after, shift
    (`diffusion.resampling.Resampling`). patch: pixels on a side of a token; without effect if there
    is a `tokenizer`.

    All fields count video frames, the window of `model.mixer` too. Only its sinks and the fields of
    `sampler` count latent frames.
    """

    baselines = generating.BASELINES

    def __init__(
        self,
        *,
        size: int,
        frames: int,
        model: Mapping,
        patch: int,
        noise: Mapping,
        prediction: str,
        weight: str,
        snr_clip: float,
        timesteps: str,
        layout: str,
        condition: Mapping,
        sampler: Mapping,
        given: int,
        shortcut: Mapping = FrozenDict(),
        resampling: Mapping = FrozenDict(),
        train_frames: int | None = None,
        history_dropout: float = 0.0,
        tokenizer: VideoTokenizer | None = None,
    ):
        choose("timesteps", timesteps, TIMESTEPS)
        positive("snr_clip", snr_clip)
        at_least("frames", frames, 2)
        between("given", given, 1, frames - 1)
        # Runs of earlier versions have no field `train_frames`.
        self.train_frames = frames if train_frames is None else min(train_frames, frames)
        between("train_frames", frames if train_frames is None else train_frames, 1, MAX_FRAMES)
        self.size, self.frames, self.given = size, frames, given
        self.prediction, self.weight, self.snr_clip = prediction, weight, snr_clip
        self.draw_timesteps, self.layout = TIMESTEPS[timesteps], parse_layout(layout)
        between("history_dropout", history_dropout, 0, 1)
        self.history_dropout, self.condition = history_dropout, dict(condition)
        # Runs of earlier versions have no fields `end` and `history`.
        self.sampler = {"end": "clean", "history": NO_HISTORY_GUIDANCE, **sampler}
        schema.check("sampler", self.sampler, SAMPLER)
        schema.check("condition", {"drop": self.condition.pop("drop", None)}, {"drop": float})
        self.drop = condition["drop"]
        with within("condition"):
            between("drop", self.drop, 0, 1)
            self.conditioner = schema.build(Conditioner, self.condition)
        with within("noise"):
            self.noise = schema.build(make_noise_schedule, noise)
        self.noise.check(prediction, weight)
        self.shortcut = schema.build(Shortcut, shortcut)
        self.reads_average = bool(self.shortcut.finest)
        self.shortcut.check(self.noise, prediction, self.sampler["steps"])
        self.resampling = schema.build(Resampling, resampling)
        with within("resampling"):
            self.resampling.check(self.layout)
        if tokenizer is None:
            at_least("patch", patch, 1)
            remedy = f"patch={patch} does not divide it; use a multiple of that, or another patch"
            require(size % patch == 0, "size", size, remedy)
            tokenizer = PixelTokenizer(patch)
        self.tokenizer = tokenizer
        self.grid = self._in_latents("size", self.tokenizer.grid, size)
        for name, value in (("frames", frames), ("given", given)):
            self._in_latents(name, self._latents, value)
        of_pixels = isinstance(tokenizer, PixelTokenizer)
        remedy = f"a tokenizer encodes whole clips; use {frames}"
        is_possible = self.train_frames == frames or of_pixels
        require(is_possible, "train_frames", self.train_frames, remedy)
        remedy = "a tokenizer encodes later frames by earlier ones, so they are no images; use 0"
        require(of_pixels or not self.layout.images, "layout", layout, remedy)
        self.model = self._make_model(model)
        remedy = "this mixer sees later frames, so no frame has a past of its own; use clean_prefix"
        streams = self.mixers.streams
        require(streams or not self.layout.teacher_forced, "layout", layout, remedy)
        remedy = "this mixer sees later frames, so no frame has a history; use 0"
        require(streams or not history_dropout, "history_dropout", history_dropout, remedy)
        self._check_sampler()
        self.terms = self._history_terms()
        options = (self.sampler[name] for name in ("eta", "end"))
        self.solver = samplers.Solver(self.noise, prediction, *options)
        self.schedule(self._latents(frames))

    def _make_model(self, options) -> DiT:
        mixer = schema.section("model.mixer", options.get("mixer"))
        options = {**options, "mixer": mixer}
        with within("model"):
            choose("dtype", options.get("dtype"), DTYPES)
            self._count_in_latents("mixer", mixer)
            if mixer.get("every"):
                mixer["attention"] = schema.section("mixer.attention", mixer.get("attention", {}))
                self._count_in_latents("mixer.attention", mixer["attention"])
            options["dtype"] = jnp.dtype(options["dtype"])
            sizes = self.shortcut.sizes
            model = schema.build(DiT, options, grid=self.grid, step_sizes=sizes)
            self.mixers = Stack(mixer, width=model.width, heads=model.heads)
        return model

    def _count_in_latents(self, field, mixer):
        """Turn the window of a mixer, if it has one, from video frames into latent ones."""
        if mixer.get("window"):
            schema.check(f"{field}.window", mixer["window"], int)
            latents = self._in_latents(f"{field}.window", self._latents, mixer["window"])
            mixer["window"] = latents

    def _check_sampler(self):
        options, kind = self.sampler, self.condition["kind"]
        with within("sampler"):
            choose("memory", options["memory"], MEMORIES)
            choose("end", options["end"], samplers.ENDS)
            levels = self.noise.num_steps
            remedy = f"there are {levels} noise levels; use 1 to {levels - 1}"
            require(1 <= options["steps"] < levels, "steps", options["steps"], remedy)
            between("eta", options["eta"], 0, 1)
            at_least("guidance", options["guidance"], 0, at_most=generating.MAX_GUIDANCE)
            at_least("block", options["block"], 1)
            at_least("s", options["s"], 0)
            require(
                options["guidance"] == 1 or kind != "none",
                "guidance",
                options["guidance"],
                "condition.kind='none' leaves nothing to guide by; use 1",
            )
            is_forced = self.layout.teacher_forced and not self.layout.together
            if is_forced and options["schedule"] != "autoregressive":
                logging.warning(
                    "task.sampler.schedule=%s: frames that are teacher-forced never read noisy "
                    "ones in training; use autoregressive",
                    options["schedule"],
                )
            require(
                self.mixers.streams or options["memory"] != "cache",
                "memory",
                options["memory"],
                "this mixer sees later frames and cannot stream; use none",
            )

    def _history_terms(self):
        """The terms of history guidance, {} without; UserError unless training knows them."""
        options = self.sampler["history"]
        scale, level, window = (options[name] for name in ("guidance", "level", "window"))
        with within("sampler.history"):
            at_least("guidance", scale, 0, at_most=generating.MAX_GUIDANCE)
            between("level", level, 0, 1)
            require(window != 1, "window", window, "a frame would see itself alone; use 2 or more")
            at_least("window", window, 0, at_most=masks.MAX_WINDOW)
            if scale == 1:
                return {}
            remedy = "training never dropped the history; use 1, or train with "
            remedy += "task.history_dropout=0.1"
            require(self.history_dropout, "guidance", scale, remedy)
            remedy = "reads what is committed; use sampler.memory=cache"
            require(self.sampler["memory"] == "cache", "guidance", scale, remedy)
            remedy = "teacher-forced frames read clean ones alone; use 0"
            require(not level or self.layout.together, "level", level, remedy)
            remedy = "this mixer sums all of the past and cannot take frames out; use 0"
            require(not window or not self.mixers.sums_up, "window", window, remedy)
            own = self.mixers.window
            remedy = f"the mixer itself has a window of {own}; use fewer, or 0"
            require(window < (own or masks.MAX_WINDOW), "window", window, remedy)
        past = guidance.Past(window or None, round(level * (self.noise.num_steps - 1)))
        return guidance.history_terms(scale, self.sampler["guidance"], past)

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
        """Latent frames that may be noisy at once: the least window, else a training clip."""
        own = self.mixers.window or self._latents(self.frames)
        return min([own, *(past.frames for past in self.terms if past.frames)])

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

    def _stream_schedule(self, frames: int) -> FrameSchedule:
        """The schedule of a stream, the same for every number of frames that it can have.

        A schedule that denoises all frames together is of these frames alone.
        """
        schedule, name, s = self.schedule(frames), self.sampler["schedule"], self.sampler["s"]
        together = name == "synchronous" or (name != "autoregressive" and s == 0)
        return schedule if together else self.schedule(max(frames, self.window))

    def binding(self):
        """The digest of a trained tokenizer."""
        return {"tokenizer_digest": self.tokenizer.digest}

    def check(self, source):
        """Raise UserError for data without the condition, or with another tokenizer's latents."""
        generating.check_source(source, self.conditioner, self.tokenizer.digest)

    def split_frames(self, frames):
        """Latent frames of a clip in training; see `tasks.base.Task`."""
        return min(self._latents(frames), self._latents(self.train_frames))

    def init(self, rng, batch):
        """(params, {}) for a batch of arrays or of their shapes; see `tasks.base.Task`."""
        B, T = batch["id"].shape[0], self._latents(self.frames)
        H, W = self.grid
        rng_model, rng_context = jax.random.split(rng)
        with within("condition"):
            cond = self.conditioner.arguments(batch, B)
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
        cond = self.conditioner.arguments(batch, drop_B.shape[0])
        return self.conditioner.apply({"params": params["conditioner"]}, drop_B, **cond)

    def _apply(self, params, x_BTNC, t_BT, context_BME=None, state=None, model=None, **options):
        model = model or self.model
        return model.apply({"params": params["model"]}, x_BTNC, t_BT, context_BME, state, **options)

    def _apply_from(self, begin, params, x_BTNC, t_BT, context_BME, **options):
        """The predictions of frames begin, begin + 1, .. that have no past."""

        def first():
            return self._apply(params, x_BTNC, t_BT, context_BME, **options)[0]

        def later():
            # Without a window the state has no slots yet, which all frames would read in vain.
            start = dict(model=self._with_window(None))
            _, state = self._apply(params, x_BTNC[:, :0], t_BT[:, :0], context_BME, **start)
            return self._apply(params, x_BTNC, t_BT, state=skip(state, begin), **options)[0]

        return jax.lax.cond(begin > 0, later, first) if self.history_dropout else first()

    def _draw(self, rng, z_BFNC, step):
        """The `TrainingClip` of a step on these clean clips."""
        return training_clip.draw(
            rng,
            z_BFNC,
            step,
            frames=self.split_frames(self.frames),
            sinks=self.mixers.anchored_sinks,
            draw_timesteps=self.draw_timesteps,
            num_steps=self.noise.num_steps,
            layout=self.layout,
            history_dropout=self.history_dropout,
            shortcut_forcing=self.shortcut,
        )

    def loss(self, params, batch, rng, *, step, frozen, extra, average=None):
        """Weighted squared error of the prediction, averaged over the frames that are targets.

        average: averaged weights, by which half steps are taken; those of `params` if None.
        """
        rng_clip, rng_eps, rng_drop, rng_past = jax.random.split(rng, 4)
        clip = self._draw(rng_clip, self._clean(frozen, batch), step)
        z_BTNC, t_BT, is_target_BT = clip.z_BTNC, clip.t_BT, clip.is_target_BT
        eps_BTNC = jax.random.normal(rng_eps, z_BTNC.shape)
        x_BTNC = self.noise.add_noise(z_BTNC, eps_BTNC, t_BT)
        x_BTNC = jnp.where(is_target_BT[:, :, None, None], x_BTNC, z_BTNC)
        drop_B = jax.random.bernoulli(rng_drop, self.drop, (len(z_BTNC),))
        context_BME = self._context(params, drop_B, batch)
        past_BTNC = self._past(params, clip, context_BME, rng_past, step)

        inputs = (x_BTNC, t_BT, clip.size_BT)
        prediction_BTNC = self._predict_clip(params, clip, past_BTNC, context_BME, *inputs)
        target_BTNC = self.noise.target(z_BTNC, eps_BTNC, t_BT, self.prediction)
        if self.shortcut.finest:
            weights, rows = params if average is None else average, self.shortcut.rows(len(z_BTNC))
            reached = jax.lax.cond(
                step >= self.shortcut.after,
                lambda: self._two_half_steps(weights, clip, past_BTNC, context_BME, x_BTNC),
                lambda: z_BTNC[rows],
            )
            reached = jnp.where(clip.is_larger[:, :, None, None], reached, z_BTNC[rows])
            target_BTNC = target_BTNC.at[rows].set(reached)
        error_BT = jnp.square(prediction_BTNC - target_BTNC).mean((-2, -1))
        weight_BT = self.noise.weight(t_BT, self.weight, self.prediction, self.snr_clip)
        targets = is_target_BT.sum()
        loss = (weight_BT * error_BT * is_target_BT).sum() / targets
        return loss, ({"mse": (error_BT * is_target_BT).sum() / targets}, extra, targets)

    def _past(self, params, clip, context_BME, rng, step):
        """The clean frames that teacher-forced ones read: those of the data, or made anew."""
        if not self.resampling.share:
            return clip.z_BTNC
        rng_own, rng_made = jax.random.split(rng)
        own = jax.random.bernoulli(rng_own, self.resampling.share)
        own &= (clip.kind == FORCED) & (step >= self.resampling.after)

        def made():
            weights, window = jax.lax.stop_gradient(params), self._window_of(clip.z_BTNC.shape[1])
            model = self._seeing(guidance.Past(), window)
            empty_BTNC, empty_BT = clip.z_BTNC[:, :0], clip.t_BT[:, :0]
            _, state = self._apply(weights, empty_BTNC, empty_BT, context_BME, model=model)

            def predict(x_BTNC, t_BT, state):
                return self._apply(weights, x_BTNC, t_BT, state=state, model=model)

            options = dict(noise=self.noise, prediction=self.prediction)
            inputs = (clip.z_BTNC, skip(state, clip.begin), rng_made, self.resampling.shift)
            return resampling.resample(predict, *inputs, **options)

        return jax.lax.cond(own, made, lambda: clip.z_BTNC)

    def _predict_clip(self, params, clip, past_BTNC, context_BME, x_BTNC, t_BT, size_BT):
        """The predictions for frames of a training clip, which read what its layout says."""

        def reading(clean_BTNC):
            options = dict(clean_BTNC=clean_BTNC, size_BT=size_BT)
            return self._apply_from(clip.begin, params, x_BTNC, t_BT, context_BME, **options)

        def alone():
            B, T = t_BT.shape
            x, t, size = (
                array.reshape(B * T, 1, *array.shape[2:]) for array in (x_BTNC, t_BT, size_BT)
            )
            context = None if context_BME is None else jnp.repeat(context_BME, T, axis=0)
            return self._apply(params, x, t, context, size_BT=size)[0].reshape(x_BTNC.shape)

        branches = (lambda: reading(None), lambda: reading(past_BTNC), alone)
        used = [kind for kind, share in enumerate(self.layout.kinds) if share]
        if len(used) == 1:
            return branches[used[0]]()
        place = jnp.searchsorted(jnp.array(used), clip.kind)
        return jax.lax.switch(place, [branches[kind] for kind in used])

    def _two_half_steps(self, params, clip, past_BTNC, context_BME, x_BTNC):
        """The x0 that the clips which learn larger steps shall predict; no gradient."""
        rows = self.shortcut.rows(len(x_BTNC))
        own, z, past, context, x = jax.tree.map(
            lambda array: array[rows],
            (clip.is_target_BT, clip.z_BTNC, past_BTNC, context_BME, x_BTNC),
        )
        weights = jax.lax.stop_gradient(params)

        def half_step(x_BTNC, t_BT, size_BT):
            x_BTNC = jnp.where(own[:, :, None, None], x_BTNC, z)
            t_BT, size_BT = jnp.where(own, t_BT, 0), jnp.where(own, size_BT, 0)
            return self._predict_clip(weights, clip, past, context, x_BTNC, t_BT, size_BT)

        inputs = (x, clip.larger_t, clip.larger_size)
        return shortcut.target(half_step, *inputs, noise=self.noise, finest=self.shortcut.finest)

    def evaluate(self, params, batch, rng, *, frozen):
        """Held-out quality of denoising and of continuing, per example.

        loss_by_level [B, 10]: squared error of x0 with all frames at the middle of each tenth of
        the timesteps; they read clean frames unless training let noisy frames read each other.
        psnr, ssim [B, F] of the continuation of the first `given` frames, and the same of the
        `baselines`; NaN at the given frames. psnr_blend, ssim_blend are of all blends [B, K, F], of
        which `pool` chooses one.
        """
        rng_eps, rng_sample = jax.random.split(rng)
        z_BTNC = self._clean(frozen, batch)
        B, T = z_BTNC.shape[:2]
        eps_BTNC = jax.random.normal(rng_eps, z_BTNC.shape)
        context_BME = self._context(params, jnp.zeros(B, bool), batch)

        def denoise(t):
            t_BT = jnp.full((B, T), t)
            x_BTNC = self.noise.add_noise(z_BTNC, eps_BTNC, t_BT)
            clean_BTNC = None if self.layout.together else z_BTNC
            options = dict(clean_BTNC=clean_BTNC)
            prediction_BTNC, _ = self._apply(params, x_BTNC, t_BT, context_BME, **options)
            x0_BTNC, _ = self.noise.split(prediction_BTNC, x_BTNC, t_BT, self.prediction)
            return jnp.square(x0_BTNC - z_BTNC).mean((1, 2, 3))

        middle = (np.arange(NOISE_BINS) + 0.5) / NOISE_BINS * self.noise.num_steps
        metrics = {"loss_by_level": jax.lax.map(denoise, middle.astype(np.int32)).T}

        first_frames = batch["video"][:, : self.given]
        cond = {**batch, "num": B, "first_frames": first_frames}
        F = batch["video"].shape[1]
        video = self.sample(params, rng_sample, cond, frozen=frozen, frames=F)
        return metrics | generating.continuation_scores(video, batch["video"], self.given)

    def pool(self, scores):
        """The scores with one blend for all clips; see `generating.pool`."""
        return generating.pool(scores)

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
        opened = self._open(params, rng, cond, frozen, batch, self._window_of(total))
        predict, state, given_BPNC = opened
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

    def stream(self, params, rng, cond, *, frozen, frames=None, carry=None):
        """A `streaming.Stream`; see `tasks.base.Generator`.

        Decoded in turn by `decode` its latents are the video of `sample` with memory "cache". One
        compiled program serves every number of frames, and neither memory nor the time of a frame
        grows, unless the mixer keeps all of the past (`mixer.window` is None).

        A switch starts a state that has read the new condition. It then reads again the frames
        that the next one sees, and the sinks. A mixer that sums all of the past has no such frames:
        it reads as many as a frame of training has before it, and forgets earlier ones. In a
        network of several layers the same holds for what the frames that are read again had seen
        of those before them.
        """
        with within("sampler"):
            memory, remedy = self.sampler["memory"], "a stream reads its cache; use cache"
            require(memory == "cache", "memory", memory, remedy)
        arrays = {name: value for name, value in cond.items() if name in CONDITIONS}
        total = self._latents(frames or self.frames)
        trained, seen = self._latents(self.train_frames), self.mixers.window
        if total > trained and seen is not None and seen >= trained:
            logging.log_first_n(
                logging.WARNING,
                "task.model.mixer: the window is %d latent frames. In training every frame saw the "
                "first of its clip, so streams of over %d frames may drift; use a shorter window",
                1,
                seen,
                trained,
            )
        given = cond["first_frames"].shape[1] if "first_frames" in cond else 0
        P = self._latents(given) if given else 0
        schedule, window = self._stream_schedule(total - P), self._window_of(total)
        plan = samplers.stream_plan(schedule)
        options = dict(batch=cond["num"], window=window, slots=plan.slots)
        given_BPNC, x_BWNC, state, kept = self._begin(params, rng, arrays, frozen, **options)
        first = given_BPNC if P and carry is None else None
        carry = carry or streaming.Carry(x_BWNC, state, samplers.BEGINNING, kept)

        def step(x_BWNC, state, piece):
            arguments = (params, rng, x_BWNC, state, piece, P)
            return self._advance(*arguments, plan=plan, window=window)

        def start_anew(cond, kept):
            remedy = "a stream without condition has none to change"
            kind = self.condition["kind"]
            require(kept is not None, "condition.kind", kind, remedy)
            arrays = {name: cond[name] for name in CONDITIONS[:-1] if name in cond}
            return self._start_anew(params, rng, arrays, kept, window=window)

        return streaming.Stream(step, carry, schedule, total - P, first, start_anew)

    def check_switch(self, frame, *, given, frames):
        """UserError unless a stream can switch before this frame; see `tasks.base.Generator`."""
        place, P = (self._in_latents("frame", self._latents, n) if n else 0 for n in (frame, given))
        schedule = self._stream_schedule(self._latents(frames) - P)
        is_begin = schedule.start(place - P) > schedule.start(place - P - 1)
        remedy = f"schedule={self.sampler['schedule']} finishes it together with the frame before "
        remedy += "it; use the first frame of a block, or --schedule=autoregressive"
        require(is_begin, "frame", frame, remedy)

    @functools.partial(jax.jit, static_argnames="self")
    def decode(self, frozen, z_BTNC, state=None):
        """The next latents of a stream -> (video float32 [B, t, H, W, 3] in [-1, 1], state)."""
        video, state = self.tokenizer.decode(frozen, z_BTNC, self.grid, state)
        return jnp.clip(video, -1, 1), state

    @functools.partial(jax.jit, static_argnames=("self", "batch", "window", "slots"))
    def _begin(self, params, rng, cond, frozen, *, batch, window, slots):
        """(given latents, noise of the first slots, state after condition and given, `Kept`)."""
        predict, state, given_BPNC = self._open(params, rng, cond, frozen, batch, window)
        x_BWNC = streaming.initial_noise(rng, given_BPNC, slots, solver=self.solver)
        kept = None
        if self.condition["kind"] != "none":
            B, P, *shape_NC = given_BPNC.shape
            kept = streaming.keep_nothing(*self._frames_kept(window), (B, *shape_NC))
            kept = streaming.keep(kept, given_BPNC, P)
        return given_BPNC, x_BWNC, samplers.commit(predict, given_BPNC, state), kept

    @functools.partial(jax.jit, static_argnames=("self", "window"))
    def _start_anew(self, params, rng, cond, kept, *, window):
        """A state that has read the condition and the frames of a stream that it keeps."""
        batch = len(kept.last_BRNC)
        predict, state, _ = self._open(params, rng, cond, {}, batch, window)
        return streaming.read_again(predict, state, kept)

    def _frames_kept(self, window):
        """(first, last) latent frames that a switch reads again; window: see `_window_of`."""
        if window is not None:
            return 0, window
        mixers, last = self.mixers, 1
        if mixers.sums_up or mixers.window is None:
            last = max(last, self._latents(self.train_frames) - 1)
        if mixers.window is not None:
            # The first frames of a convolution are exact if it reads the frames before them again.
            last = max(last, mixers.window - 1 + self.model.conv - 1)
        return mixers.sinks, last

    @functools.partial(
        jax.jit,
        static_argnames=("self", "plan", "window"),
        donate_argnames=("x_BWNC", "state"),
    )
    def _advance(self, params, rng, x_BWNC, state, piece, given, *, plan, window):
        predict = self._predict(params, rng, window)
        options = dict(solver=self.solver, plan=plan)
        return streaming.advance(predict, x_BWNC, state, piece, given, rng, **options)

    def _window_of(self, total):
        """The window of the mixer in a stream of `total` latent frames, None as it is.

        Nothing leaves a window as long as the stream, and a scan needs a cache of one size.
        """
        return None if self.mixers.constant_state else total

    def _with_window(self, window, sinks=None) -> DiT:
        """The network with another window, and other sinks, if its mixer has them."""
        return self.model.clone(mixer=through_window(self.model.mixer, window, sinks))

    def _seeing(self, past, window):
        """The network as it sees a `guidance.Past` in a stream of this window (`_window_of`)."""
        if past.frames:
            return self._with_window(past.frames, sinks=0)
        return self.model if window is None else self._with_window(window)

    def _predict(self, params, rng, window, context_BME=None):
        """The network with this window (see `_window_of`) and guidance, as samplers call it."""

        def predict(model, x_BTNC, t_BT, state):
            options = dict(model=model)
            if self.shortcut.finest:  # frames without noise are read and take no step
                size = self.shortcut.size_of(self.sampler["steps"])
                options["size_BT"] = jnp.where(t_BT > 0, size, 0)
            if self.mixers.streams:
                return self._apply(params, x_BTNC, t_BT, state=state, **options)
            # A mixer that sees the future cannot continue: every call reads everything.
            return self._apply(params, x_BTNC, t_BT, context_BME, **options)[0], state

        if self.terms:
            models = [self._seeing(past, window) for past in self.terms]
            predicts = [functools.partial(predict, model) for model in models]
            return guidance.HistoryGuided(self.terms, predicts, skip, self.noise, rng)
        predict = functools.partial(predict, self._seeing(guidance.Past(), window))
        scale = self.sampler["guidance"]
        return predict if scale == 1 else guidance.classifier_free(predict, scale)

    def _open(self, params, rng, cond, frozen, batch, window):
        """(predict, state that has read the context alone, clean latents of `first_frames`)."""
        drop_B = jnp.zeros(batch, bool)
        context_BME = self._context(params, drop_B, cond)
        null_BME = negative_BME = self._context(params, ~drop_B, cond)
        if "negative_text" in cond:
            negative_BME = self._context(params, drop_B, {"text": cond["negative_text"]})
        empty_BTNC = jnp.zeros((batch, 0, self.grid[0] * self.grid[1], self.tokenizer.channels))
        given_BPNC = empty_BTNC
        if "first_frames" in cond:
            given_BPNC = self._encode(frozen, cond["first_frames"])

        def start(context_BME, model):
            copies = 1 if context_BME is None else len(context_BME) // batch
            x_BTNC = jnp.concatenate([empty_BTNC] * copies)
            t_BT = jnp.zeros(x_BTNC.shape[:2], jnp.int32)
            return self._apply(params, x_BTNC, t_BT, context_BME, model=model)[1]

        if self.terms:
            # No history comes without any condition, a negative one too.
            contexts = [
                context_BME if past.conditional else null_BME if past.frames == 0 else negative_BME
                for past in self.terms
            ]
            models = [self._seeing(past, window) for past in self.terms]
            state = guidance.Histories(tuple(map(start, contexts, models)), jnp.int32(0))
        else:
            if self.sampler["guidance"] != 1:
                context_BME = jnp.concatenate([context_BME, negative_BME])
            state = start(context_BME, self.model)
        return self._predict(params, rng, window, context_BME), state, given_BPNC
