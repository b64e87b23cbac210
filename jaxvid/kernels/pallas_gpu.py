"""What the Pallas kernels for NVIDIA GPUs share: whether they apply, and their products."""

import jax
import jax.numpy as jnp

from jaxvid.parallel.devices import cuda_capability

try:
    from jax.experimental.pallas import triton
except ImportError:  # a later jax
    triton = None


def check(arrays, dtypes, widest: int):
    """Raise NotImplementedError unless Triton kernels run here, on such arrays.

    arrays: q, k and v, all of one of `dtypes`, heads of at most `widest` channels.
    """
    if triton is None:
        raise NotImplementedError(f"jax {jax.__version__} does not lower Pallas to Triton")
    capability = cuda_capability()
    if capability is not None and capability < 8:
        raise NotImplementedError(f"compute capability {capability}: 8.0 or more is needed")
    found = sorted({str(x.dtype) for x in arrays})
    if len(found) > 1 or found[0] not in dtypes:
        raise NotImplementedError(f"q, k, v of {', '.join(found)}: all must be {dtypes[0]}")
    width = max(x.shape[3] for x in arrays)
    if width > widest:
        raise NotImplementedError(f"width {width}: at most {widest}")


def dot(a, b, letters: str):
    """An einsum of two matrices that adds up in float32; float32 operands are not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(letters, a, b, precision=precision, preferred_element_type=jnp.float32)
