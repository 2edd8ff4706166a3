"""Adapters to be converted, where to, and with what options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_analysis.adapter import Adapter, Target
from lora_analysis.update import LowRankUpdate

# One rounding of a scale or a factor to float32, of entries compared with the largest.
ROUNDED = 1e-6


def language_model(r: int = 4, scale: float = 2.0, dtype: torch.dtype = torch.float32) -> Adapter:
    """An adapter with the names of a Llama type of 2 layers, 4 heads and 2 key-value heads of 8."""
    shapes = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "mlp.down_proj": (32, 48)}
    return Adapter(
        {
            f"model.layers.{i}.{name}": LowRankUpdate(
                torch.randn(d_out, r).to(dtype), torch.randn(r, d_in).to(dtype), scale
            )
            for i in range(2)
            for name, (d_out, d_in) in shapes.items()
        },
        source="llama",
    )


def diffusion_model() -> Adapter:
    """An adapter of a U-Net with a convolution, and of its text encoder."""
    names = {
        "unet.down_blocks.0.attentions.0.to_q": ((24, 16), ()),
        "unet.conv_in": ((12, 36), (3, 3)),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": ((20, 20), ()),
    }
    return Adapter(
        {
            name: LowRankUpdate(torch.randn(d_out, 3), torch.randn(3, d_in), 0.5 + i)
            for i, (name, ((d_out, d_in), _)) in enumerate(names.items())
        },
        targets={name: Target(f"{name}.weight", kernel=kernel) for name, (_, kernel) in names.items()},
        source="diffusion",
    )


def close(found: Any, expected: Any) -> None:
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDED * np.abs(expected).max())


OPTIONS: dict[str, dict[str, Any]] = {
    "peft": {},
    "mlx": {},
    "kohya": {"component": "text_encoder"},
    "diffusers": {"component": "text_encoder"},
    "gguf": {"architecture": "llama", "heads": (4, 2)},
}


def destination(folder: Path, to: str) -> Path:
    return folder / {"kohya": "out.safetensors", "diffusers": "out.safetensors", "gguf": "out.gguf"}.get(to, to)
