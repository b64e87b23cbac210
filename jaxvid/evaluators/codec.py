"""A trained tokenizer: its speed, and videos of any length through it."""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxvid import checks, data, weights
from jaxvid.data.source import Source
from jaxvid.data.transforms import normalize
from jaxvid.errors import UserError, within
from jaxvid.evaluators.held_out import HeldOut, frames_of
from jaxvid.metrics import lpips, quality
from jaxvid.parallel.devices import device_name
from jaxvid.parallel.sharding import replicated
from jaxvid.tasks.base import Run

REPEATS = 5  # of encoding and decoding; their speed is of the median


def with_lpips(run: Run, path) -> Run:
    """The run with the weights of LPIPS in a file instead of those it was trained with."""
    checks.at_least("data.size", run.config.data.size, lpips.MIN_SIZE)
    params = lpips.convert(weights.read(path, "--lpips"), f"--lpips={path}")
    frozen = {**run.frozen, "lpips": jax.device_put(params, replicated(run.mesh))}
    return run._replace(frozen=frozen)


def tokens_per_frame(run: Run) -> np.ndarray:
    """Tokens, or latents without codes, per frame of a clip as the run was trained on, float []."""
    tokenizer, frames = run.task.tokenizer, run.config.data.frames
    cells = np.prod(tokenizer.grid(run.config.data.size))
    return cells * tokenizer.latents_for_frames(frames) / frames


def speed(run: Run, held_out: HeldOut) -> dict:
    """Tokens and frames per second of encoding and of decoding a batch of held-out clips.

    The median of REPEATS after compilation, from pixels on the device to stored tokens (latents if
    there are no codes) and back; with the number and length of the clips and the device.
    """
    tokenizer, size = run.task.tokenizer, run.config.data.size
    store = tokenizer.tokens if tokenizer.quantizer.size else tokenizer.encode
    _, batch, _ = next(held_out.batches(1))
    video_BTHWC = batch["video"]

    @jax.jit
    def encode(params, video_u8):
        return store(params, normalize(video_u8))[0]

    @jax.jit
    def decode(params, stored):
        z_BTNZ = tokenizer.from_stored(params, stored)
        return tokenizer.decode(params, z_BTNZ, tokenizer.grid(size))[0]

    stored = encode(run.params, video_BTHWC)
    found = {}
    for name, function, argument in (("encode", encode, video_BTHWC), ("decode", decode, stored)):
        jax.block_until_ready(function(run.params, argument))
        times = []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            jax.block_until_ready(function(run.params, argument))
            times.append(time.perf_counter() - begin)
        seconds = statistics.median(times)
        found[f"{name}_tokens_per_s"] = float(np.prod(stored.shape[:3]) / seconds)
        found[f"{name}_frames_per_s"] = float(np.prod(video_BTHWC.shape[:2]) / seconds)
    clips, frames = video_BTHWC.shape[:2]
    return {**found, "clips_at_once": clips, "frames_of_a_clip": frames, "device": device_name()}


def long_videos(run: Run, lengths: list[str]) -> dict[int, Source]:
    """{frames: source of held-out clips of that length}, for lengths from the command line.

    Raises UserError for a length that is no number, does not suit the tokenizer, or has no clips.
    """
    found = {}
    for frames in frames_of(lengths):
        fields = ConfigDict(run.config.data.to_dict())
        fields.frames = frames
        try:
            run.task.tokenizer.latents_for_frames(frames)
            with within("data"):
                found[frames] = data.make_source(fields, "validation")
        except UserError as error:
            raise UserError(
                f"--frames={frames}: no held-out clips of this length: {error}"
            ) from error
    return found


def reconstruct_long(run: Run, source: Source, frames: int, limit: int) -> dict:
    """PSNR and SSIM of the first `limit` clips of a source, encoded and decoded as streams.

    {"clips", "frames_at_once", the means "psnr" and "ssim", and these "_by_frame"}. Clips pass one
    at a time and in pieces: the device holds one piece and the states of encoder and decoder, and
    the host the pixels of a clip in uint8.
    """
    tokenizer = run.task.tokenizer
    grid, lengths = tokenizer.grid(run.config.data.size), tokenizer.pieces(frames)

    @jax.jit
    def reconstruct(params, video_u8, states):
        video_BTHWC = normalize(video_u8)
        z_BTNZ, encoder = tokenizer.encode(params, video_BTHWC, states[0])
        output_BTHWC, decoder = tokenizer.decode(params, z_BTNZ, grid, states[1])
        pair = jnp.clip(output_BTHWC, -1, 1), video_BTHWC
        return {"psnr": quality.psnr(*pair), "ssim": quality.ssim(*pair)}, (encoder, decoder)

    rows = []
    for index in range(min(len(source), limit)):
        clip_BTHWC = source.read(index)["video"][None]
        states, found = (None, None), []
        for piece_BTHWC in np.split(clip_BTHWC, np.cumsum(lengths)[:-1], axis=1):
            piece_BTHWC = jax.device_put(piece_BTHWC, replicated(run.mesh))
            scores, states = reconstruct(run.params, piece_BTHWC, states)
            found.append(jax.device_get(scores))
        rows.append({name: np.concatenate([x[name][0] for x in found]) for name in found[0]})
    curves = {name: np.mean([row[name] for row in rows], axis=0) for name in rows[0]}
    return {
        "clips": len(rows),
        "frames_at_once": max(lengths),
        **{name: float(curve.mean()) for name, curve in curves.items()},
        **{f"{name}_by_frame": curve.tolist() for name, curve in curves.items()},
    }
