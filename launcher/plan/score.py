"""Predict published rows, and compare what was predicted with what was measured."""

from collections.abc import Mapping

from launcher.plan import rows


def measured_speed(text: Mapping[str, str]) -> float | None:
    """Return a row's measured tokens/s of one device, from its TFLOP/s or step time where it does not say it itself.

    None where it says neither, or FLOPs by a convention that is not known.
    """
    told = rows.number(text.get("tokens_per_s_per_gpu", ""))
    if told:
        return told
    batch, seconds, devices, sequence = (
        rows.number(text.get(name, "")) for name in ("global_batch", "iter_time_s", "n_gpus", "seq_len")
    )
    if batch and seconds and devices and sequence:
        return batch * sequence / seconds / devices
    work, flops = _flops_per_token(text), rows.number(text.get("tflops_per_gpu", ""))
    return flops * 1e12 / work if work and flops else None


def _flops_per_token(text: Mapping[str, str]) -> float | None:
    named = text.get("flops_convention", "").replace(" ", "")
    row = rows.parse(text)
    shape, s = row.setting.shape, row.setting.sequence
    if shape is None or not text.get("hidden"):
        return None
    n, layers, h, v = row.setting.parameters, shape.layers, shape.width, shape.vocabulary
    if "96B" in named:
        return 96 * layers * h * h * (1 + s / (6 * h) + v / (16 * layers * h))
    if "72B" in named:
        return 72 * layers * h * h * (1 + s / (6 * h) + v / (16 * layers * h))
    if "8N" in named:
        return 8.0 * n
    if "6(N-Vh)+12Lhs" in named:
        return 6.0 * (n - v * h) + 12.0 * layers * h * s
    if "6(N-Vh)+6Lhs" in named:
        return 6.0 * (n - v * h) + 6.0 * layers * h * s
    if "6N+12Lhs" in named:
        return 6.0 * n + 12.0 * layers * h * s
    return 6.0 * n if named == "6N" else None
