"""A model run block by block: one decoder block in memory at a time.

The model is built without weights; what lies outside the decoder blocks (embeddings, final norm) is loaded once, each
block when its turn comes. Checkpoint names are mapped to module names by transformers itself, so a model that
transformers can load needs nothing here.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.calibration.block import Block, Call
from fewbits.calibration.stats import InputTap
from fewbits.quant.architecture import empty_model
from fewbits.quant.errors import ModelError
from fewbits.quant.source import Source
from fewbits.quant.targets import Target, find_targets, read_weight

BATCH_TOKENS = 2048
"""Tokens per forward pass; changes results by float rounding only."""


Inputs = Tensor | Mapping[str, Tensor]
"""What a model is called with: token ids ``(B, L)``, or all its arguments by name, as a processor makes them."""


def one_expert_at_a_time(model: Any) -> None:
    """Let a model with fused experts run them as linears, one by one, where they can be seen."""
    if hasattr(model, "set_experts_implementation"):
        with suppress(ValueError, AttributeError):
            model.set_experts_implementation("eager")


class StreamedModel:
    """A language model, perhaps one that takes images, whose decoder blocks are loaded one at a time.

    Attributes:
        model: the transformers model; parameters of blocks that are not loaded are on the meta device.
        blocks_path: module path of the list of decoder blocks, e.g. ``model.layers``.
        targets: everything that can be quantized, by name, in module order.

    Raises:
        ModelError: transformers does not know the architecture, or it has no list of decoder blocks.
    """

    def __init__(self, source: Source, *, dtype: torch.dtype, device: torch.device) -> None:
        from huggingface_hub.errors import StrictDataclassError

        # what transformers raises for a config.json that it does not know or that makes no sense
        failures = (ValueError, KeyError, ImportError, TypeError, AttributeError, ArithmeticError, StrictDataclassError)
        self.source, self.dtype, self.device = source, dtype, device
        try:
            model = empty_model(source.path, _stored_dtype(source))
        except failures as error:
            raise ModelError(f"{source.name}: transformers cannot build this model: {error}") from error
        model.eval()
        model.config.use_cache = False
        one_expert_at_a_time(model)
        self.model = model
        self.blocks_path = find_blocks(model)
        self.targets = {t.name: t for t in find_targets(model)}
        self._keys = self._map_keys()
        self._require_complete()

    # -- names ---------------------------------------------------------------------------------------------------

    @property
    def block_modules(self) -> nn.ModuleList:
        modules = self.model.get_submodule(self.blocks_path)
        assert isinstance(modules, nn.ModuleList)
        return modules

    def block_index(self, name: str) -> int | None:
        """The decoder block that a tensor of this (module tree) name belongs to, or None."""
        if not name.startswith(self.blocks_path + "."):
            return None
        return int(name[len(self.blocks_path) + 1 :].partition(".")[0])

    def source_keys(self, index: int | None) -> dict[str, list[str]]:
        """Module tree name -> names in the source checkpoint, of block ``index`` (None: outside the blocks)."""
        return {name: keys for name, keys in self._keys.items() if self.block_index(name) == index}

    def _map_keys(self) -> dict[str, list[str]]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self._conversion = get_model_conversion_mapping(self.model)
        renamings = [c for c in self._conversion if isinstance(c, WeightRenaming)]
        converters = [c for c in self._conversion if isinstance(c, WeightConverter)]
        state = self.model.state_dict()
        prefix = self.model.base_model_prefix
        self._converted: set[str] = set()
        mapped: dict[str, list[str]] = {}
        for key in self.source.keys():  # noqa: SIM118 - a method, not a dict
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=state)
            mapped.setdefault(name, []).append(key)
            if pattern is not None:
                self._converted.add(name)
        return mapped

    @cached_property
    def tied(self) -> dict[str, str]:
        """Parameters that are another one by a second name: ``{"lm_head.weight": "model.embed_tokens.weight"}``."""
        tie = getattr(self.model.config, "tie_word_embeddings", False)
        return dict(self.model.all_tied_weights_keys) if tie else {}

    def _require_complete(self) -> None:
        """Every parameter is in the source, or the one that it is tied to, in its shape: said before any work is done.

        Raises:
            ModelError: naming the first that is not.
        """
        tied = self.tied
        optional = [re.compile(p) for p in self.model._keys_to_ignore_on_load_missing or ()]
        for name, param in self.model.named_parameters(remove_duplicate=False):
            twins = {name, tied.get(name, name), *(t for t, s in tied.items() if s == name)}
            if twins.isdisjoint(self._keys) and not any(p.search(name) for p in optional):
                raise ModelError(f"{name}: not in the checkpoint {self.source.name}; download it again")
            keys = self._keys.get(name, [])
            shape = self.source.info(keys[0])[0] if keys and name not in self._converted else tuple(param.shape)
            if shape != tuple(param.shape):
                raise ModelError(f"{name}: got shape {shape}, config.json needs {tuple(param.shape)}; the two do not "
                                 "belong together, download them again")

    # -- loading -------------------------------------------------------------------------------------------------

    def _load(self, keys: Sequence[str]) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig
        from transformers.utils import logging as tf_logging

        tensors = {k: self.source.get(k) for k in keys}
        config = LoadStateDictConfig(
            device_map={"": str(self.device)}, dtype=self.model.dtype,
            weight_mapping=self._conversion,  # type: ignore[arg-type]  # annotated narrower than what it takes
        )
        bars = tf_logging.is_progress_bar_enabled()
        tf_logging.disable_progress_bar()  # one bar per block would bury ours
        try:
            convert_and_load_state_dict_in_model(self.model, tensors, config)
        finally:
            if bars:
                tf_logging.enable_progress_bar()

    def weight(self, target: Target) -> Tensor:
        """The weight ``(N, K)`` of a target outside the blocks, read from the source (a tied one from its twin)."""
        name = f"{target.module_path}.{target.param_name}"
        keys = self._keys.get(name) or self._keys[self.model.all_tied_weights_keys[name]]
        return self.source.get(keys[0])

    def dense_tensors(self, block: Block | None, skip: set[str]) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of a block (None: outside the blocks) but ``skip``, as the source stores it.

        Names are those of the module tree. What transformers merges or splits when it loads (fused experts) comes
        merged or split.
        """
        for name, key in self._dense(None if block is None else block.index, skip):
            if key is None:
                assert block is not None, f"{name}: merged or split outside the decoder blocks"
                yield name, block.converted[name]
            else:
                yield name, self.source.get(key)

    def dense_infos(self, index: int | None, skip: set[str]) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of every tensor that :meth:`dense_tensors` gives, without reading any."""
        for name, key in self._dense(index, skip):
            shape, dtype = self._stored[name] if key is None else self.source.info(key)
            yield name, shape, dtype

    @cached_property
    def _stored(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of everything in the model's state dict."""
        return {name: (tuple(t.shape), t.dtype) for name, t in self.model.state_dict().items()}

    def _dense(self, index: int | None, skip: set[str]) -> Iterator[tuple[str, str | None]]:
        """Tensors of a block but ``skip``, and where the source has them: None where they are merged or split."""
        for name, keys in self.source_keys(index).items():
            if name in self._stored and name not in skip and name not in self.tied:
                yield name, None if name in self._converted else keys[0]
        if index is None:
            for name, twin in self.tied.items():  # the source may hold what they share under either name
                if twin not in skip and twin not in self._keys:
                    yield twin, self._keys[name][0]

    def is_tied(self, target: Target) -> bool:
        """Whether another parameter is this one by a second name, as a head may be the table of the embedding."""
        return f"{target.module_path}.{target.param_name}" in self.tied.values()

    def head_input(self, hidden: Tensor) -> Tensor:
        """What the output head multiplies, ``(B, L, K)``, given the hidden states that leave the last block."""
        seen: list[Tensor] = []

        def see(name: str, x: Tensor, tokens: Tensor) -> None:
            seen.append(x)
            raise _Seen

        for module in self.block_modules:
            module.forward = lambda states, *args, **kwargs: hidden.to(self.model.dtype)  # type: ignore[method-assign]
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)
        watched = {self.model.get_output_embeddings().weight.data_ptr(): "head"}
        try:
            with torch.no_grad(), suppress(_Seen), InputTap(watched, see, ids.numel()):
                self.model(ids, use_cache=False)
        finally:
            for module in self.block_modules:
                del module.forward
        return seen[0]

    @contextmanager
    def outer(self, *, head: bool = False) -> Iterator[None]:
        """Inside: what lies outside the decoder blocks is in memory; the output head only where it is asked for."""
        output, inputs = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        left_out: set[int] = set()
        if not head and output is not None:  # a head tied to the embeddings comes with them
            left_out = {id(p) for p in output.parameters()} - {id(p) for p in inputs.parameters()}
        params = {
            n: p for n, p in self.model.named_parameters(remove_duplicate=False)
            if self.block_index(n) is None and id(p) not in left_out
        }
        buffers = {n for n, _ in self.model.named_buffers() if self.block_index(n) is None}
        self._load([k for n in (*params, *buffers) for k in self._keys.get(n, [])])
        self.model.tie_weights()
        self._require_loaded(params)
        try:
            yield
        finally:
            for name in params:
                path, _, leaf = name.rpartition(".")
                meta = nn.Parameter(self.model.get_parameter(name).detach().to("meta"), requires_grad=False)
                self.model.get_submodule(path).register_parameter(leaf, meta)
            self.model.tie_weights()

    def _require_loaded(self, names: Iterable[str]) -> None:
        for name in names:
            if self.model.get_parameter(name).is_meta:
                raise ModelError(f"{name}: not in the checkpoint {self.source.name}; download it again")

    def blocks(self) -> Generator[Block]:
        """Each decoder block in turn, with its weights; they leave memory when the next one is asked for."""
        for index, module in enumerate(self.block_modules):
            name = f"{self.blocks_path}.{index}"
            keys = self.source_keys(index)
            self._load([k for ks in keys.values() for k in ks])
            self._require_loaded(f"{name}.{n}" for n, _ in module.named_parameters())
            targets = [t for t in self.targets.values() if t.name.startswith(name + ".") and t.kind != "embedding"]
            weights = {t.name: read_weight(self.model, t) for t in targets}
            tree = {f"{name}.{n}": p.detach() for n, p in module.named_parameters()}
            converted = {n: p for n, p in tree.items() if n in self._converted}
            stored = [p.dtype for p in module.parameters()]
            for param in module.parameters():
                param.requires_grad_(False)
                param.data = param.data.to(self.dtype)
            try:
                yield Block(name, index, module, targets, weights, converted, self.model)
            finally:
                module.to("meta")
                for param, dtype in zip(module.parameters(), stored):
                    param.data = param.data.to(dtype)  # a later pass loads into what it finds: not rounded, then

    # -- running -------------------------------------------------------------------------------------------------

    def first_inputs(self, rows: Iterable[Inputs]) -> tuple[list[Tensor], list[list[Call]]]:
        """Hidden states entering the first block for each batch of inputs, and the calls of each block.

        The model's own forward runs with every block replaced by one that records what it is called with, so masks,
        rotary embeddings and whatever else a model hands to its blocks come from the model itself; so does what its
        vision tower makes of images.

        Raises:
            ModelError: the model changes hidden states between its blocks, so they cannot be run one by one.
        """
        hidden: list[Tensor] = []
        calls: list[list[Call]] = []
        for batch in rows:
            seen: list[Call] = []
            entered: list[Tensor] = []

            def record(
                states: Tensor, *args: Any, seen: list[Call] = seen, entered: list[Tensor] = entered, **kwargs: Any
            ) -> Tensor:
                if not entered:
                    entered.append(states)
                    hidden.append(states.to(self.dtype))
                elif states.shape == entered[0].shape and not torch.equal(states, entered[0]):
                    raise ModelError(
                        f"{type(self.model).__name__}: adds to the hidden states between its decoder blocks, so these "
                        "cannot be calibrated one at a time on such inputs; calibrate on text alone"
                    )
                seen.append(Call(_cast(args, self.dtype), _cast(kwargs, self.dtype)))
                if len(seen) == len(self.block_modules):
                    raise _Seen
                return states

            for module in self.block_modules:
                module.forward = record  # type: ignore[method-assign]
            try:
                with torch.no_grad(), suppress(_Seen):
                    self.model(**self._placed(batch), use_cache=False)
            finally:
                for module in self.block_modules:
                    del module.forward
            calls.append(seen)
        return hidden, calls

    def _placed(self, batch: Inputs) -> dict[str, Tensor]:
        """What the model is called with, on its device; floats (pixels) in its dtype."""
        inputs = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        return {k: _cast(v, self.model.dtype).to(self.device) for k, v in inputs.items()}


def find_blocks(model: nn.Module) -> str:
    """Path of the list of decoder blocks: the ModuleList, not inside another one, with the most parameters.

    It is looked for in what transformers calls the decoder, so that a vision tower is none.

    Raises:
        ModelError: the model has none.
    """
    decoder: Any = getattr(model, "get_decoder", lambda: model)()
    within = {id(module) for module in decoder.modules()}
    best, best_size = "", 0
    for path, module in model.named_modules():
        if id(module) not in within:
            continue
        inside = any(isinstance(model.get_submodule(path[:i]), nn.ModuleList) for i, c in enumerate(path) if c == ".")
        if isinstance(module, nn.ModuleList) and not inside:
            size = sum(p.numel() for p in module.parameters())
            if size > best_size:
                best, best_size = path, size
    if not best:
        raise ModelError(f"{type(model).__name__}: found no list of decoder blocks; this architecture is not supported")
    return best


def _stored_dtype(source: Source) -> torch.dtype:
    """The one float dtype of the source's matrices, or float32 where they differ."""
    dtypes = {dtype for shape, dtype in map(source.info, source.keys()) if len(shape) >= 2 and dtype.is_floating_point}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors inside call arguments to the compute dtype (rotary cos and sin, additive masks)."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_cast(v, dtype) for v in value)
    if isinstance(value, dict):
        return {k: _cast(v, dtype) for k, v in value.items()}
    return value


class _Seen(Exception):
    """Everything that was wanted of this forward pass has been seen."""
