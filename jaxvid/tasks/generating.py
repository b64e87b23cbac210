"""What the tasks that generate share: checks of their data, and scores of continued clips."""

import jax
import jax.numpy as jnp

from jaxvid.checks import require
from jaxvid.data.transforms import normalize
from jaxvid.errors import UserError, within
from jaxvid.metrics import baselines, quality

MAX_GUIDANCE = 1000.0  # a scale that leaves no digits to the predictions
BASELINES = (*baselines.NAMES, baselines.BLEND)


def check_source(source, conditioner, digest: str) -> None:
    """Raise UserError for data without the condition, or with another tokenizer's latents.

    digest: of the task's own tokenizer, "" without one.
    """
    if source.tokenizer not in ("", digest):
        raise UserError(
            f"tokenizer: is {digest or 'none'}, but data.path holds latents of the tokenizer "
            f"{source.tokenizer}; name the folder they were encoded with, or encode again with "
            "python -m jaxvid.tokenize"
        )
    kind, rows, classes = conditioner.kind, conditioner.num_classes, source.num_classes
    with within("condition"):
        remedy = f"the data has {classes} classes; use {classes} or more"
        require(kind != "class" or classes <= rows, "num_classes", rows, remedy)
        remedy = "the data has no captions; use class or none"
        require(kind != "text" or source.captions, "kind", kind, remedy)


def continuation_scores(video: jax.Array, real_u8: jax.Array, given: int) -> dict[str, jax.Array]:
    """PSNR and SSIM by frame of continued clips and of guesses without a network.

    video: float32 [B, F, H, W, 3] in [-1, 1], whose first `given` frames are those of real_u8.
    psnr, ssim [B, F], and the same of the `baselines`, NaN at the given frames. psnr_blend,
    ssim_blend are of all blends [B, K, F], of which `pool` chooses one.
    """
    truth = normalize(real_u8)
    is_scored_F = jnp.arange(truth.shape[1]) >= given
    found = baselines.guesses(truth[:, :given])

    def scores(guess):
        guess = jnp.broadcast_to(guess, truth.shape)
        pair = quality.psnr(guess, truth), quality.ssim(guess, truth)
        return {n: jnp.where(is_scored_F, x, jnp.nan) for n, x in zip(("psnr", "ssim"), pair)}

    metrics = scores(video)
    for baseline, guess in found.items():
        metrics |= {f"{name}_{baseline}": x for name, x in scores(guess).items()}
    of_blends = jax.lax.map(scores, baselines.blends(found))
    return metrics | {f"{n}_{baselines.BLEND}": x.swapaxes(0, 1) for n, x in of_blends.items()}


def pool(scores: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """`continuation_scores` with one blend for all clips, that with the best mean PSNR on them.

    share_of_last_blend, share_of_mean_blend [B] are its shares of the last given frame and of
    their mean; the rest is ground.
    """
    best = baselines.best_blend(scores["psnr_blend"])
    shares_3 = jnp.asarray(baselines.BLENDS_K3)[best]
    B = len(scores["psnr_blend"])
    return scores | {
        **{name: scores[name][:, best] for name in ("psnr_blend", "ssim_blend")},
        "share_of_last_blend": jnp.full(B, shares_3[0]),
        "share_of_mean_blend": jnp.full(B, shares_3[1]),
    }
