"""Quantizers, which stand between an encoder and a decoder; the protocol is `base.Quantizer`."""

from jaxvid.layers.quantize.base import Quantizer as Quantizer
from jaxvid.layers.quantize.base import usage as usage
from jaxvid.layers.quantize.fsq import FSQ
from jaxvid.layers.quantize.kl import KL
from jaxvid.layers.quantize.lfq import BSQ, LFQ
from jaxvid.layers.quantize.vq import VQ

QUANTIZERS = {"vq": VQ, "fsq": FSQ, "lfq": LFQ, "bsq": BSQ, "kl": KL}
