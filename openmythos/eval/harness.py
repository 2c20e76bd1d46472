"""Our models in lm-evaluation-harness (0.4.13), and its tasks by name, file or folder.

Import this module only where it is needed: the harness is an optional dependency, and takes seconds
to load.
"""

import contextlib
import functools
import inspect
import io
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401  (registers the harness' own models, before ours)
import torch
import yaml
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from openmythos.checkpoint.weights import DTYPES
from openmythos.eval.score import Measured, Outcomes, Score, summarise
from openmythos.eval.scoring import GenerationRequest, Scorer
from openmythos.eval.task import choice_baselines
from openmythos.eval.task_name import SHIPPED, no_such_task
from openmythos.folder import in_a_sentence
from openmythos.interop.hub import local_folder
from openmythos.interop.loading import load_pretrained
from openmythos.tokenizer import Tokenizer
from openmythos.tokenizer_folder import NOT_OBEYED, named_templates

SHIPPED_FOLDER = Path(__file__).parent / "tasks"
DEFAULT_NEW_TOKENS = 256  # the default of the harness' own models
BOOTSTRAPS = 1000
AUTO_BATCH = 64  # rows that "auto" begins with
GENERATION_WORDS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
ANY = object()
# Options of other models that are accepted, at values with which they change nothing.
NEUTRAL: Mapping[str, Mapping[str, Any]] = {
    "model_args": {
        **dict.fromkeys(("trust_remote_code", "use_fast_tokenizer", "low_cpu_mem_usage"), ANY),
        **dict.fromkeys(("parallelize", "truncation", "logits_cache"), False),
        "backend": "causal",
        "revision": "main",
        "subfolder": "",
    },
    "generation_kwargs": {
        **dict.fromkeys(("use_cache", "pad_token_id", "length_penalty", "early_stopping"), ANY),
        **NOT_OBEYED,
        "repetition_penalty": 1,
        "skip_special_tokens": True,
    },
}


@register_model("openmythos")
class HarnessModel(TemplateLM):
    """Answers the harness' three kinds of request with a ``Scorer``.

    Its arguments are named as those of the harness' ``hf`` model.

    Args:
        pretrained: A scorer; or a checkpoint, for ``lm_eval --model openmythos --model_args
            pretrained=PATH``.
        num_loops: Loops per token; default: the model's.
        batch_size: Rows per batch, or ``auto``; does not change scores.
        max_batch_size: The most rows that ``auto`` takes.
        max_length: The most tokens that are read at once; default: the model's maximum.
        dtype: Dtype of the weights; ``auto``: as stored.
        device: Device of a model loaded from a folder.
        weights: Of such a model, ``stored``, or ``int8``: in 8 bits, on a CPU.
        add_bos_token: Whether contexts begin with the ids that the tokenizer begins a text with.
        seed: Seed of random initial states and of samples.
        others: Arguments of other models, which are accepted where they change nothing.

    Raises:
        ValueError: An argument is unknown or its value is not allowed.
    """

    def __init__(
        self,
        pretrained: Scorer | str | os.PathLike[str],
        *,
        num_loops: int | None = None,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        dtype: str | torch.dtype | None = None,
        device: str = "cpu",
        weights: str = "stored",
        add_bos_token: bool = True,
        seed: int = 0,
        **others: Any,
    ) -> None:
        super().__init__()
        known = [name for name in inspect.signature(HarnessModel).parameters if name != "others"]
        _refuse_others("model_args", others, known)
        if not isinstance(pretrained, Scorer):
            size, stored = rows_per_batch(batch_size, max_batch_size), dtype_of(dtype)
            folder = local_folder(pretrained)
            model = load_pretrained(folder, dtype=stored, device=device, weights=weights)
            pretrained = Scorer(
                model=model,
                codec=Tokenizer.load(folder),
                num_loops=model.config.num_loops if num_loops is None else num_loops,
                batch_size=size,
                add_bos=add_bos_token,
                limit=max_length,
                seed=seed,
            )
        self.scorer = pretrained
        self._template: str | None = None
        self._device = pretrained.model.embed.weight.device

    @property
    def num_loops(self) -> int:
        """Loops per token; may be set between evaluations."""
        return self.scorer.num_loops

    @num_loops.setter
    def num_loops(self, value: int) -> None:
        self.scorer.num_loops = value

    @property
    def batch_size(self) -> int:
        """Rows per batch."""
        return self.scorer.batch_size

    @property
    def max_length(self) -> int:
        """The most tokens that are read at once."""
        return self.scorer.max_len

    @property
    def max_gen_toks(self) -> int:
        """The limit of new tokens for tasks that set none."""
        return DEFAULT_NEW_TOKENS

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        eos = self.scorer.codec.eos_id
        return self.scorer.prefix_id if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        return self.scorer.prefix_id

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches requests."""
        codec = self.scorer.codec
        name = codec.fingerprint if isinstance(codec, Tokenizer) else type(codec).__name__
        return f"openmythos-{name}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's chat template, for the record; a name chooses among several.

        From then on marks such as ``<|im_start|>`` in texts are read as the tokens.

        Raises:
            ValueError: It has no such template.
        """
        if chat_template is False:
            return None
        codec = self.scorer.codec
        given = codec.settings.get("chat_template") if isinstance(codec, Tokenizer) else None
        named = named_templates(given)
        name = "default" if chat_template is True else chat_template
        if not isinstance(codec, Tokenizer) or name not in named:
            has = f"has only {', '.join(sorted(named))}" if named else "has none"
            raise ValueError(f"chat template {name!r} was asked for, and the tokenizer {has}")
        self._template, self.scorer = named[name], replace(self.scorer, special=True)
        return self._template

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text, up to where an answer begins or, without, in its midst.

        Raises:
            ValueError: There is no chat template, or it refuses the messages.
        """
        template = self.chat_template(True) if self._template is None else self._template
        codec = self.scorer.codec
        assert isinstance(codec, Tokenizer)  # it has a template
        names: dict[str, Any] = {
            "template": template,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = codec.chat_text(chat_history, **names)
        except ValueError:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            text = codec.chat_text(rest, **names)
            logging.getLogger(__name__).warning("the chat template takes no system message")
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].lstrip()
        last = last if last in text else last.rstrip()  # some templates strip, others do not
        return text[: text.rindex(last) + len(last)]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids of a text; with bos unless the caller or the scorer disables it."""
        if add_special_tokens is False:
            return self.scorer.codec.encode(string, special=self.scorer.special)
        return self.scorer.encode_context(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return self.scorer.encode_pair(context, continuation)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        """Per continuation: its log-likelihood in nats, and whether greedy decoding gives it."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = True, **_: Any
    ) -> list[tuple[float, bool]]:
        scores = self.scorer.score_tokens([(list(ctx), list(cont)) for _, ctx, cont in requests])
        for (key, _, _), score in zip(requests, scores, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, score)
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of each whole text, in nats."""
        totals = self.scorer.rolling([request.args[0] for request in requests])
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The generated continuations, each up to its first stop text."""
        asked = [generation_request(*request.args) for request in requests]
        texts = self.scorer.generate(asked)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts


def rows_per_batch(given: int | str, most: int | None) -> int:
    """The rows per batch that the harness' ``batch_size`` asks for.

    ``auto`` begins with the most rows; the scorer takes fewer where memory does not suffice.

    Raises:
        ValueError: It is neither a positive number nor ``auto`` or ``auto:N``.
    """
    automatic, _, number = str(given).partition(":")
    if automatic == "auto" and (not number or number.isdecimal()):
        return int(most or AUTO_BATCH)
    if not str(given).isdecimal() or int(given) < 1:
        raise ValueError(f"batch_size is {given!r}; give a positive number or auto")
    return int(given)


def dtype_of(given: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype with this name; None for ``auto``, as stored.

    Raises:
        ValueError: It is not one of those that weights can have.
    """
    if given is None or given == "auto":
        return None
    names = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    found = names.get(str(given).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype is {str(given)!r}; give auto, {', '.join(names)}")
    return found


def _refuse_others(where: str, options: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse options that would change something and are not supported."""
    harmless = NEUTRAL[where]
    refused = {
        name: value
        for name, value in options.items()
        if not (value is None or harmless.get(name) is ANY or harmless.get(name) == value)
    }
    if refused:
        said = ", ".join(f"{name}={value!r}" for name, value in sorted(refused.items()))
        raise ValueError(f"{where} has {said}; supported are {', '.join(sorted(known))}")


def generation_request(context: str, options: Mapping[str, Any]) -> GenerationRequest:
    """A task's ``generation_kwargs`` as a request.

    Raises:
        ValueError: They ask for something that is not supported, such as beam search.
    """
    given = {name: value for name, value in options.items() if value is not None}
    known = normalize_gen_kwargs(given, DEFAULT_NEW_TOKENS)
    others = {name: value for name, value in known.items() if name not in GENERATION_WORDS}
    _refuse_others("generation_kwargs", others, GENERATION_WORDS)
    temperature = known.get("temperature", 1.0) if known["do_sample"] else 0.0
    drawn = temperature > 0
    top_k = known.get("top_k") or 0
    return GenerationRequest(
        context=context,
        max_new_tokens=known["max_gen_toks"],
        stops=tuple(stop for stop in known["until"] if stop),
        temperature=temperature,
        top_k=top_k if drawn and top_k > 0 else None,  # 0 and -1 are other programs' for all
        top_p=known.get("top_p") if drawn else None,
    )


# --- tasks ----------------------------------------------------------------------------------------


def read_task(path: Path, **changes: Any) -> dict[str, Any]:
    """Read a task file; its data files are looked up beside it.

    Args:
        path: YAML in the harness' format.
        changes: Fields to replace.

    Raises:
        ValueError: It is not a task file.
    """
    try:
        config = load_yaml(path)
    except (OSError, ValueError, ImportError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as a task: {_first_line(error)}") from None
    if not isinstance(config.get("task"), str):
        raise ValueError(f"{path} has no task: NAME; give a file of one task")
    options = config.get("dataset_kwargs") or {}
    files = options.get("data_files")
    if files is not None:
        absolute = _beside(files, path.resolve().parent)
        config["dataset_kwargs"] = {**options, "data_files": absolute}
    return {**config, **changes}


def _beside(files: Any, folder: Path) -> Any:
    if isinstance(files, dict):
        return {split: _beside(part, folder) for split, part in files.items()}
    if isinstance(files, list):
        return [_beside(part, folder) for part in files]
    return str(folder / files) if (folder / files).is_file() else files


def task_files(spec: str) -> list[Path] | None:
    """The task files at a path; None if ``spec`` is a task's name and not a path.

    Raises:
        ValueError: There is no such file, or the folder has no task file.
    """
    path = Path(spec)
    if path.is_dir():
        files = sorted(path.rglob("*.yaml"))
        if not files:
            raise ValueError(f"{path} holds no task file (*.yaml)")
        return files
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"task file {path} does not exist")
        return [path]
    return None


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks and groups loaded by the harness, to be measured at any number of depths."""

    loaded: Mapping[str, Any]
    seed: int = 0

    def measure(self, scorer: Scorer, limit: int | None) -> dict[tuple[str, str], Measured]:
        """Every score of every task at the scorer's depth, by task and metric."""
        for task in self.loaded["tasks"].values():
            task.set_fewshot_seed(seed=self.seed)  # the same examples at every depth
        said = io.StringIO()  # collects progress bars and notes
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            found = evaluate(
                HarnessModel(scorer),
                {**self.loaded},
                limit=limit,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=True,
            )
        return dict(_measured(found))


def load_tasks(
    specs: Sequence[str], *, num_fewshot: int | None = None, seed: int = 0
) -> HarnessTasks:
    """Load tasks by name (data from the hub), by file, or all files of a folder.

    Args:
        specs: Names and paths.
        num_fewshot: Few-shot examples per question, except in tasks that fix the number at 0.
        seed: Seed of the choice of few-shot examples.

    Raises:
        ValueError: A name is unknown, a file is not a task, or data cannot be reached.
    """
    # Without a connection the hub's client logs every retry; our error says it once.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    chosen: list[tuple[str, Any]] = []
    for spec in specs:
        files = task_files(spec)
        chosen += [(spec, spec)] if files is None else [(str(f), read_task(f)) for f in files]
    manager = _manager(any(isinstance(what, str) for _, what in chosen))
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for spec, what in chosen:
        for kind, found in _load(manager, spec, what).items():
            loaded[kind].update(found)
    for task in loaded["tasks"].values():
        fixed = task.get_config("num_fewshot")
        if num_fewshot is not None and fixed != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif fixed is None:
            task.set_config(key="num_fewshot", value=0)
    return HarnessTasks(loaded, seed)


@functools.cache
def _manager(include_defaults: bool) -> TaskManager:
    """The harness' task manager, cached: reading its thousands of task files takes seconds."""
    return TaskManager(include_defaults=include_defaults)


def _load(manager: TaskManager, spec: str, what: Any) -> Mapping[str, Any]:
    if isinstance(what, str) and what not in manager.task_index:
        raise ValueError(no_such_task(what, manager.all_tasks))
    try:
        return manager.load([what])
    except Exception as error:  # network, hub and format errors have no common class
        reason = f"{type(error).__name__}: {_first_line(error)}"
        if isinstance(what, str):
            raise ValueError(
                f"task {spec} has its data on the Hugging Face hub, which could not be read "
                f"({reason}); offline, use task files or {', '.join(SHIPPED)}"
            ) from None
        raise ValueError(f"task file {spec} cannot be loaded ({reason})") from None


def _first_line(error: Exception) -> str:
    return " ".join(in_a_sentence(error).split())[:200]


# --- results --------------------------------------------------------------------------------------


def _measured(found: Mapping[str, Any]) -> Iterable[tuple[tuple[str, str], Measured]]:
    for task, metrics in {**found["results"], **found.get("groups", {})}.items():
        logged = found["samples"].get(task, [])
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, float | int):
                continue
            stderr = metrics.get(f"{metric}_stderr,{chosen}")
            higher = found["higher_is_better"].get(task, {}).get(metric)
            outcomes = _outcomes(metric, [row for row in logged if row["filter"] == chosen])
            known = None if outcomes is None else summarise(outcomes).stderr
            if outcomes is not None and not math.isclose(summarise(outcomes).value, value):
                outcomes = known = None  # the task computes its score differently
            score = Score(
                float(value),
                float(stderr) if isinstance(stderr, float | int) else known,
                int(metrics.get("sample_len", len(logged))),
            )
            name = metric if chosen == "none" else f"{metric} ({chosen})"
            yield (
                (task, name),
                Measured(
                    score=score,
                    outcomes=outcomes,
                    higher_is_better=higher is not False,
                    baselines=_baselines(metric, logged),
                ),
            )


def _outcomes(metric: str, rows: Sequence[Mapping[str, Any]]) -> Outcomes | None:
    """Outcomes per question of a metric that is a mean or bits per byte; None for other metrics."""
    values = [row[metric] for row in rows if metric in row]
    if not values or len(values) != len(rows):
        return None
    if metric == "bits_per_byte":
        return [(-nats / math.log(2), float(size)) for nats, size in values]
    if metric in ("acc", "acc_norm", "acc_bytes", "exact_match"):
        return [(float(value), 1.0) for value in values]
    return None


def _baselines(metric: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Guessers' scores on a multiple choice in which all choices share one context."""
    questions = []
    for row in rows:
        asked, answer = row["arguments"], row["target"]
        contexts = {context for context, *_ in asked}
        if not metric.startswith("acc") or len(asked) < 2 or len(contexts) != 1:
            return {}
        if not isinstance(answer, int) or not 0 <= answer < len(asked):
            return {}
        questions.append((asked[0][0], [part[1] for part in asked], answer))
    return choice_baselines(questions) if questions else {}


if __name__ == "__main__":  # the harness' command, for its releases that look for no entry points
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
