"""Tables of a benchmark for the terminal."""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING, Any

from raytrain.utils.text import duration

if TYPE_CHECKING:
    from rich.table import Table


def summary(result: dict[str, Any]) -> str:
    """Return the tables of a result with medians and ranges, then the estimate of a run, then the noise."""
    from rich.console import Console

    console = Console(record=True, width=120, file=StringIO(), highlight=False)
    machine = result["machine"]
    features = f" ({', '.join(machine['cpu_features'])})" if machine["cpu_features"] else ""
    console.print(f"{result['model']} on {machine.get('gpu', machine['cpu'])}{features}, {machine['threads']} threads")
    for name, draw in _TABLES.items():
        part = result.get(name)
        if part is None:
            continue
        if "skipped" in part:
            console.print(f"{name}: left out, {part['skipped']}")
        else:
            console.print(draw(part))
    for line in [*_run(result.get("run")), *_noise(result["noise"])]:
        console.print(line, soft_wrap=True)
    return console.export_text()


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def _series(series: dict[str, Any] | None, form: str = ",.0f", scale: float = 1.0, unit: str = "") -> str:
    """Return a series as median (minimum-maximum)."""
    if series is None:
        return ""
    middle, least, most = (format(series[key] / scale, form) for key in ("median", "min", "max"))
    return f"{middle}{unit} ({least}-{most})"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _ceiling(part: dict[str, Any]) -> Table:
    table = _table("peak rates of the machine", "", "shape", "GFLOP/s or GB/s")
    for precision, shapes in part["products"].items():
        for name, row in sorted(shapes.items(), key=lambda item: -item[1]["operations_per_second"]["median"]):
            shape = " x ".join(map(str, row["shape"]))
            table.add_row(f"{precision} product, {name}", shape, _series(row["operations_per_second"], ",.1f", 1e9))
    copied = f"{part['copy']['bytes'] / 2**20:.0f} MiB"
    table.add_row("copy, read and written", copied, _series(part["copy"]["bytes_per_second"], ",.1f", 1e9))
    return table


def _steps(part: list[dict[str, Any]], title: str) -> Table:
    beside = any("times_plain" in row for row in part)
    columns = ("batch", "type", "bytes/s", "s/step", "of ceiling", "no look-ups", *(["x plain"] if beside else []))
    table = _table(title, *columns)
    for row in part:
        table.add_row(
            str(row["batch_size"]),
            row["precision"],
            _series(row["bytes_per_second"]),
            _series(row["step_seconds"], ".3g"),
            _share(row.get("share_of_ceiling")),
            _share(row.get("share_without_look_ups")),
            *([_series(row.get("times_plain"), ".2f")] if beside else []),
        )
    return table


def _scaling(part: dict[str, Any]) -> Table:
    columns = ("workers", "threads each", "same batch, bytes/s", "efficiency", "same batch each, bytes/s", "efficiency")
    table = _table(f"DDP (a batch of {part['batch_size']}, or as many for each worker)", *columns)
    for row in part["workers"]:
        mark = " (more than cores)" if row["oversubscribed"] else ""
        table.add_row(
            f"{row['workers']}{mark}",
            str(row["threads"]),
            _series(row["fixed_batch_bytes_per_second"]),
            _share(row["fixed_batch_efficiency"]["median"]),
            _series(row["fixed_share_bytes_per_second"]),
            _share(row["fixed_share_efficiency"]["median"]),
        )
    return table


def _ray(part: dict[str, Any]) -> Table:
    table = _table(f"Ray Train beside torchrun, {part['workers']} workers of {part['threads']} threads", "", "")
    table.add_row("torchrun, bytes/s", f"{part['torchrun_bytes_per_second']:,.0f}")
    table.add_row("Ray Train, bytes/s", f"{part['ray_bytes_per_second']:,.0f}")
    interval = part["ray_over_torchrun"]["confidence_95"]
    between = "" if interval is None else f" (95% confidence {interval[0]:.3f}-{interval[1]:.3f})"
    table.add_row("Ray Train over torchrun", f"{part['ray_over_torchrun']['median']:.3f}{between}")
    table.add_row("a call of log", _series(part["call_seconds"]["log"], ".3f", 1e-3, " ms"))
    table.add_row("a call of evaluated", _series(part["call_seconds"]["evaluated"], ".1f", 1e-3, " ms"))
    table.add_row("share of a step inside report calls", f"{part['share_inside_reports']:.3%}")
    table.add_row("Ray's processes while idle, cores", f"{part['idle_cores']:.3f}")
    return table


def _checkpoint(part: dict[str, Any]) -> Table:
    table = _table(f"checkpoint of {part['bytes'] / 1e6:.1f} MB every {part['steps_between']} steps", "", "")
    table.add_row("copying the state", _series(part["copy_seconds"], ".2f", 1e-3, " ms"))
    table.add_row("inside save", _series(part["save_seconds"], ".2f", 1e-3, " ms"))
    table.add_row("until it is written", _series(part["commit_seconds"], ".0f", 1e-3, " ms"))
    table.add_row("share of the time inside save", f"{part['share_inside_save']['median']:.4%}")
    table.add_row("share of the time, copy and waiting included", f"{part['share_of_stall']['median']:.3%}")
    table.add_row("a step beside the writing, over one alone", _series(part["step_beside_over_alone"], ".2f"))
    return table


def _sampling(part: dict[str, Any]) -> Table:
    table = _table("sampling (untrained weights)", "", "bytes/s", "texts/s")
    for title, key in ((f"{part['num']} together", "batched"), ("one at a time", "one_at_a_time")):
        rates = part[key]
        table.add_row(title, _series(rates["bytes_per_second"]), _series(rates["texts_per_second"], ",.1f"))
    table.add_row("together over one at a time", _series(part["times_one_at_a_time"], ".1f"), "")
    return table


def _data(part: dict[str, Any]) -> Table:
    table = _table("data alone", "", "")
    table.add_row("bytes/s", _series(part["bytes_per_second"]))
    if "times_fastest_step" in part:
        table.add_row("times what the fastest step consumes", _series(part["times_fastest_step"], ",.0f"))
    return table


def _memory(part: list[dict[str, Any]]) -> Table:
    table = _table("peak memory of a training process, MB", "batch", "type", "resident", "anonymous", "GPU")
    for row in part:
        peak = {name: f"{value / 1e6:,.0f}" for name, value in row["peak_bytes"].items()}
        table.add_row(
            str(row["batch_size"]), row["precision"], peak["resident"], peak["anonymous"], peak.get("gpu", "")
        )
    return table


def _run(run: dict[str, Any] | None) -> list[str]:
    if run is None:
        return []
    return [
        f"a run of {run['steps']:,} steps (batch {run['batch_size']}, {run['precision']}) would take here "
        f"{duration(run['seconds'])}, {run['hours']:.2f} hours: training {duration(run['training_seconds'])}, "
        f"{run['evaluations']} evaluations {duration(run['evaluation_seconds'])}"
    ]


def _noise(noise: dict[str, Any]) -> list[str]:
    if not noise["noisy"]:
        return ["the machine was quiet"]
    return [f"noisy machine, take these numbers with care: {'; '.join(noise['noisy'])}"]


_TABLES: dict[str, Any] = {
    "ceiling": _ceiling,
    "step": lambda part: _steps(part, "training step"),
    "plain": lambda part: _steps(part, "the same step in plain PyTorch, float32"),
    "ddp": _scaling,
    "ray": _ray,
    "checkpoint": _checkpoint,
    "sampling": _sampling,
    "data": _data,
    "memory": _memory,
}
