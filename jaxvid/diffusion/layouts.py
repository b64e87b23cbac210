"""Layouts of a training clip: which of its frames are noisy, and what the noisy frames read."""

from typing import NamedTuple

from jaxvid import checks

# What the noisy frames of a step read: each other; clean frames before them; nothing, as images.
TOGETHER, FORCED, ALONE = range(3)


class Layout(NamedTuple):
    """The probabilities of the four layouts, which sum to 1.

    diffusion_forcing: every frame is noisy and reads noisy frames (Chen et al. 2024; AR-Diffusion).
    clean_prefix: the first frames are clean, condition and not target; the others are noisy.
    teacher_forced: every frame is noisy and reads the clean frames before it, as in sampling one
    frame after another; twice the tokens for a clip whose frames are all targets.
    """

    diffusion_forcing: float = 0.0
    clean_prefix: float = 0.0
    teacher_forced: float = 0.0
    images: float = 0.0

    @property
    def together(self) -> float:
        """The probability that noisy frames read each other."""
        return self.diffusion_forcing + self.clean_prefix

    @property
    def prefix(self) -> float:
        """The probability of a clean prefix where noisy frames read each other."""
        return self.clean_prefix / max(self.together, 1e-9)

    @property
    def kinds(self) -> tuple[float, float, float]:
        """The probabilities of TOGETHER, FORCED and ALONE."""
        return self.together, self.teacher_forced, self.images


def parse_layout(text: str) -> Layout:
    """ "teacher_forced", or a mixture: "clean_prefix=0.7,diffusion_forcing=0.3".

    Raises UserError for an unknown name, a share that is no probability, and shares that do not
    sum to 1.
    """
    shares = {}
    for part in text.split(","):
        name, equals, number = part.strip().partition("=")
        checks.choose("layout", name, Layout._fields)
        checks.require(name not in shares, "layout", text, f"names {name} twice")
        shares[name] = _number(number) if equals else 1.0
        remedy = f"{name} needs a probability from 0 to 1, as in {name}=0.5"
        checks.require(0 <= shares[name] <= 1, "layout", text, remedy)
    total = sum(shares.values())
    remedy = f"the shares sum to {total:g}; they must sum to 1"
    checks.require(abs(total - 1) < 1e-6, "layout", text, remedy)
    return Layout(**shares)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
