"""Zero-shot tasks by lm-evaluation-harness, from its own catalogue or from local files.

Local tasks come from one folder: the user's own task YAMLs, or plain data files (``piqa.jsonl``, ``blimp/*.jsonl``)
for which ``configs/tasks`` has a template. Nothing local needs a network.
"""

from __future__ import annotations

import io
import logging
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from fewbits.quant.errors import FewbitsError

TaskScores = dict[str, dict[str, float | int | None]]
"""task -> metric -> value, ``metric_stderr`` -> its standard error, and ``documents``."""

BATCH_SIZE = 8
_BOOTSTRAP = 200  # draws for the metrics that have no closed-form error; others ignore it
_FEWSHOT_SEED = 1234  # lm-eval's own default


@dataclass(frozen=True)
class TaskSet:
    """Tasks to run, every name known to exist.

    Attributes:
        names: tasks, groups and tags as the user gave them.
        configs: local tasks and groups by name, as lm-eval YAML, with absolute paths to their data.
        origins: where each name comes from, in words.
        catalogue: whether lm-eval's own tasks are needed.
    """

    names: tuple[str, ...]
    configs: Mapping[str, dict[str, Any]] = field(repr=False)
    origins: Mapping[str, str]
    catalogue: bool


def find_tasks(tasks: Sequence[str], task_dir: str | Path | None = None) -> TaskSet:
    """Look the names up: first the YAMLs in ``task_dir``, then templates whose data lie there, then lm-eval's own.

    Raises FewbitsError when lm-eval is not installed, the folder is missing, or a name is unknown.
    """
    _lm_eval()
    if task_dir is not None and not Path(task_dir).expanduser().is_dir():
        raise FewbitsError(f"--task-dir {task_dir}: no such directory; pass the one that holds the tasks or their data")
    configs: dict[str, dict[str, Any]] = {}
    origins: dict[str, str] = {}
    broken: list[str] = []
    if task_dir is not None:
        folder = Path(task_dir).expanduser().resolve()
        _add_templates(folder, configs, origins)
        broken = _add_yamls(folder, configs, origins)
    local = sorted(origins)
    for name in tasks:
        if name in origins:
            continue
        if name not in (names := _catalogue().all_tasks):
            hint = f"; not readable as YAML: {', '.join(broken)}" if broken else ""
            raise FewbitsError(f"--tasks {name}: no such task; {_suggest(name, local, names)}{hint}")
        origins[name] = "lm-eval's catalogue"
    used = {member for name in tasks for member in configs.get(name, {}).get("task", ()) if "group" in configs[name]}
    return TaskSet(tuple(tasks), configs, {name: origins[name] for name in tasks},
                   catalogue=not {*tasks, *used} <= set(local))


def run_tasks(
    model: Any, tokenizer: Any, tasks: TaskSet | Sequence[str], *, task_dir: str | Path | None = None,
    limit: int | None = None, batch_size: int = BATCH_SIZE,
) -> TaskScores:
    """Score a loaded transformers ``model`` on tasks; ``limit``: at most so many documents of each.

    Errors are lm-eval's: closed forms for means, 200 bootstrap draws (seeded) elsewhere. A group gives its members
    too. Raises FewbitsError for a task that is unknown or whose data cannot be read.
    """
    lm_eval = _lm_eval()
    from datasets.exceptions import DatasetsError

    found = tasks if isinstance(tasks, TaskSet) else find_tasks(tasks, task_dir)
    names = ",".join(found.names)
    with tempfile.TemporaryDirectory(prefix="fewbits-tasks-") as folder, _quiet():
        _write(found.configs, Path(folder))
        try:
            loaded = _load(found, folder)
        except (OSError, DatasetsError) as e:  # files and networks, as `datasets` reports them
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise FewbitsError(f"--tasks {names}: the data cannot be read ({reason}); without a network pass a folder "
                               "that holds them as --task-dir") from e
        except ValueError as e:  # a task asked for twice, by itself and in a group
            raise FewbitsError(f"--tasks {names}: {e}") from e
        # simple_evaluate would also call git and pip to describe the machine
        results = lm_eval.evaluate(
            _quiet_lm()(pretrained=model, tokenizer=tokenizer, batch_size=batch_size), loaded, limit=limit,
            bootstrap_iters=_BOOTSTRAP, log_samples=False,
        )
    return _scores(results)


def _load(found: TaskSet, folder: str) -> Any:
    """The tasks with their data, and the few-shot settings that lm-eval's own command line gives them."""
    from lm_eval.tasks import TaskManager

    if found.catalogue and not found.configs:
        manager = _catalogue()
    else:
        manager = TaskManager(include_path=folder, include_defaults=found.catalogue)
    loaded = manager.load(list(dict.fromkeys(found.names)))
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return loaded


def _quiet_lm() -> Any:
    """lm-eval's transformers model, with its progress bars only where standard error is a terminal."""
    from lm_eval.models.huggingface import HFLM

    hide = not sys.stderr.isatty()

    class QuietHFLM(HFLM):
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=hide)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=hide)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().generate_until(requests, disable_tqdm=hide)

    return QuietHFLM


def _scores(results: Mapping[str, Any]) -> TaskScores:
    """lm-eval's ``{"acc,none": 0.5, "acc_stderr,none": 0.1}`` by plain names; a filter that is not "none" is kept."""
    out: TaskScores = {}
    for task, metrics in results["results"].items():
        scores = out.setdefault(task, {})
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not kind or (isinstance(value, str) and value != "N/A"):
                continue
            is_error = metric.endswith("_stderr")
            name = metric.removesuffix("_stderr") + ("" if kind == "none" else f"_{kind}")
            known = value != "N/A" and math.isfinite(value)
            scores[f"{name}_stderr" if is_error else name] = float(value) if known else None
        counts = results.get("n-samples", {})
        members = [t for t in results.get("group_subtasks", {}).get(task, []) if t in counts] or [task]
        if all(m in counts for m in members):
            scores["documents"] = sum(counts[m]["effective"] for m in members)
    return out


def _add_templates(folder: Path, configs: dict[str, dict[str, Any]], origins: dict[str, str]) -> None:
    """Tasks for the data files in ``folder`` that a template of ours describes."""
    for template in sorted(p.name for p in files("fewbits.configs").joinpath("tasks").iterdir()):
        if not template.endswith(".yaml"):
            continue
        config = _parse(files("fewbits.configs").joinpath("tasks", template).read_text(encoding="utf-8"))
        name, pattern = config["task"], config["dataset_kwargs"]["data_files"]["test"]
        paths = _find_data(folder, pattern)
        members = [name] if "*" not in pattern else [f"{name}_{p.stem}" for p in paths]
        for member, path in zip(members, paths):
            configs[member] = {**config, "task": member, "dataset_kwargs": {"data_files": {"test": str(path)}}}
            origins[member] = f"template {template} on {path.relative_to(folder.parent)}"
        if paths and "*" in pattern:
            configs[name] = {"group": name, "task": members,
                             "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
            origins[name] = f"template {template} on {len(paths)} files"


def _find_data(folder: Path, pattern: str) -> list[Path]:
    """Files of ``pattern`` in the folder or one level below, or in it by its own name (``blimp`` for blimp/*)."""
    roots = [folder, *sorted(p for p in folder.iterdir() if p.is_dir())]
    if Path(pattern).parent.name == folder.name:
        roots.append(folder.parent)
    for root in roots:
        if found := sorted(root.glob(pattern)):
            return found
    return []


def _add_yamls(folder: Path, configs: dict[str, dict[str, Any]], origins: dict[str, str]) -> list[str]:
    """The user's own task files, included as they are, but with data files made absolute.

    Returns the files that are not YAML.
    """
    broken = []
    for path in sorted(folder.rglob("*.yaml")):
        try:
            config = _read_yaml(path)
        except (yaml.YAMLError, UnicodeDecodeError):
            broken.append(path.name)
            continue
        kind = "group" if "group" in config else "task"
        name = config.get(kind)
        if not isinstance(name, str):
            continue  # a part that others include
        configs[name] = {"include": str(path), kind: name}
        if kind == "group" and all(isinstance(member, str) for member in config.get("task") or [None]):
            configs[name]["task"] = config["task"]
        kwargs = config.get("dataset_kwargs")
        if isinstance(kwargs, dict):
            configs[name]["dataset_kwargs"] = {
                k: _absolute(v, path.parent) if k in ("data_files", "data_dir") else v for k, v in kwargs.items()}
        tags = config.get("tag") or []
        for known in (name, *([tags] if isinstance(tags, str) else tags)):
            origins[known] = str(path.relative_to(folder.parent))
    return broken


def _absolute(value: Any, folder: Path) -> Any:
    """``value`` with each path that exists beside the YAML made absolute; others are left to lm-eval."""
    if isinstance(value, dict):
        return {k: _absolute(v, folder) for k, v in value.items()}
    if isinstance(value, list):
        return [_absolute(v, folder) for v in value]
    if isinstance(value, str) and "://" not in value and not Path(value).is_absolute() and any(folder.glob(value)):
        return str(folder / value)
    return value


def _read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A task file with its includes merged, as lm-eval does it, functions left out; {} when it is not a mapping."""
    config = _parse(path.read_text(encoding="utf-8"))
    includes = config.pop("include", [])
    merged: dict[str, Any] = {}
    for include in [includes] if isinstance(includes, str) else includes:
        part = path.parent / include
        if part.is_file() and part not in seen:
            merged |= _read_yaml(part, (*seen, path))
    return merged | config


class _Loader(yaml.SafeLoader):
    """Knows no objects: ``!function x.y`` reads as None."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def _parse(text: str) -> dict[str, Any]:
    config = yaml.load(text, _Loader)
    return config if isinstance(config, dict) else {}


def _write(configs: Mapping[str, dict[str, Any]], folder: Path) -> None:
    for i, config in enumerate(configs.values()):
        (folder / f"{i}.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def _suggest(name: str, local: list[str], catalogue: list[str]) -> str:
    if close := get_close_matches(name, [*local, *catalogue], n=1, cutoff=0.6):
        return f"did you mean {close[0]!r}?"
    return (f"known from --task-dir: {', '.join(local) or 'none'}; {len(catalogue)} others are in lm-eval's catalogue "
            "(lm-eval ls tasks)")


@lru_cache(maxsize=1)
def _catalogue() -> Any:
    """A task manager of lm-eval's own tasks; takes seconds to make, for it parses thousands of files."""
    from lm_eval.tasks import TaskManager

    with _quiet():
        return TaskManager()


def _lm_eval() -> Any:
    try:
        import lm_eval
    except ImportError as e:
        raise FewbitsError(f"--tasks: needs lm-eval ({e}); pip install 'fewbits[tasks]'") from e
    return lm_eval


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval without its chatter, and without the worker processes that it would fork for bootstraps."""
    logger = logging.getLogger("lm_eval")
    level, multiproc = logger.level, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if multiproc is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = multiproc
