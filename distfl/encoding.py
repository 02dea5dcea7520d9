"""How a client's update becomes bytes: which codec, of what, and whether what it loses is kept for the next round."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from distfl.codecs.base import Codec, NoOptions, load_codec
from distfl.codecs.exact import Exact
from distfl.config import TransportConfig
from distfl.errors import ConfigError
from distfl.transport.base import WORD
from distfl.units import VALUE_BYTES, UnitTable, Window


@dataclass(frozen=True)
class Encoding:
    """Args:
    deltas: encode differences from the shared tensors that the round started from, which both sides hold.
    error_feedback: add to a difference what was lost of earlier ones, e <- (delta + e) - decode(encode(delta + e)), per
        client and tensor (Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847).
    """

    codec: Codec = Exact(NoOptions())
    deltas: bool = False
    error_feedback: bool = False

    def upload_bytes(self, table: UnitTable, window: Window) -> int:
        """Payload of the whole tensors of a window, without block headers."""
        return sum(self._unit_bytes(table, unit) for unit in window.units)

    def sending_bytes(self, table: UnitTable, window: Window) -> int:
        """Most bytes that encoding a window's update unit by unit holds besides the weights and residuals."""
        return _sending_bytes(self, table, window)

    def residual_bytes(self, table: UnitTable, window: Window) -> int:
        """What the client keeps from round to round for the units of a window."""
        return table.window_bytes(window) if self.error_feedback else 0

    def working_bytes(self, shape: tuple[int, ...]) -> int:
        """Most bytes that encoding one tensor holds besides its values, its residual and the block it goes into."""
        return self.deltas * VALUE_BYTES * math.prod(shape) + self.codec.working_bytes(shape)

    def _unit_bytes(self, table: UnitTable, unit: int) -> int:
        return WORD.itemsize * sum(self.codec.encoded_words(tensor.shape) for tensor in table[unit].tensors)


@lru_cache(maxsize=2**12)
def _sending_bytes(encoding: Encoding, table: UnitTable, window: Window) -> int:
    blocks = most = 0
    for unit in window.units:
        blocks += encoding._unit_bytes(table, unit)
        most = max(most, blocks + max((encoding.working_bytes(tensor.shape) for tensor in table[unit].tensors), default=0))
    return most


def encoding_of(config: TransportConfig) -> Encoding:
    """What the config asks for (raises ConfigError where it contradicts itself)."""
    codec = load_codec(config.codec, config.codec_options)
    deltas = not codec.lossless if config.deltas == "auto" else config.deltas == "on"
    feedback = codec.biased if config.error_feedback == "auto" else config.error_feedback == "on"
    if feedback and codec.lossless:
        raise ConfigError(
            f"transport.error_feedback = on with the codec {config.codec}", "it loses nothing", "set transport.error_feedback=auto or off"
        )
    if (feedback or codec.biased) and not deltas:
        asked = "transport.error_feedback = on" if feedback else f"the codec {config.codec}"
        raise ConfigError(
            f"{asked} with transport.deltas = off",
            "what is lost of whole weights does not make up for itself",
            "set transport.deltas=auto or on",
        )
    return Encoding(codec, deltas, feedback)
