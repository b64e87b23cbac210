"""Distances between sets of videos: FVD, MMD and JEDi, with the protocol of the comparison."""

import jax
import numpy as np

from jaxvid import weights
from jaxvid.data.transforms import normalize
from jaxvid.evaluators.held_out import HeldOut, samples
from jaxvid.metrics import frechet, i3d
from jaxvid.tasks.base import Run

DISTANCES = {"fvd": frechet.frechet, "mmd_unbiased": frechet.mmd, "jedi": frechet.jedi}


def unavailable(params, clips: int) -> str:
    """Why there is no distance of videos; "" if there is one."""
    if params is None:
        return "unavailable: no weights of I3D were given (--i3d)"
    if clips < frechet.MIN_SAMPLES:
        return f"unavailable: needs at least {frechet.MIN_SAMPLES} held-out clips; here are {clips}"
    return ""


def video_distance(run: Run, held_out: HeldOut, batches: int, params, path, repeats=4) -> dict:
    """Distances between held-out clips and samples under their conditions, with the protocol.

    params: of I3D, read from the file `path`. A task that continues clips begins its samples with
    the first frames of the real ones. real_against_real: the same distances between halves of the
    real clips, over `repeats` splits, which shows the bias of the sample size.
    """
    features = jax.jit(i3d.features)
    real, fake = [], []
    for rng, batch, new in held_out.batches(batches):
        batch = {name: np.asarray(rows)[new] for name, rows in batch.items()}
        real.append(features(params, normalize(batch["video"])))
        fake.append(features(params, samples(run, batch, rng)))
    real_ND, fake_ND = np.concatenate(real), np.concatenate(fake)
    floors = {}
    for name, distance in DISTANCES.items():
        draws = np.random.default_rng(run.config.seed)  # the same halves for every distance
        mean, spread = frechet.floor(real_ND, distance, draws, repeats)
        floors[name] = {"mean": mean, "std": spread}
    fields = run.config.data
    return {
        **{name: distance(real_ND, fake_ND) for name, distance in DISTANCES.items()},
        "real_against_real": {"clips": len(real_ND) // 2, **floors},
        "protocol": {
            "clips": len(real_ND),
            "samples_per_clip": 1,
            "given_frames": run.task.given,
            "frames": fields.frames,
            "stride": fields.stride,
            "size": fields.size,
            "data": fields.name,
            "split": "validation",
            "features": "I3D logits, mean over time",
            "weights_sha256": weights.digest(path),
            "resize": f"bilinear to {i3d.SIZE}, TensorFlow 1 grid",
            "compression": "none",
            "ddof": 1,
            "repeats": repeats,
            "seed": run.config.seed,
            "step": run.step,
        },
    }
