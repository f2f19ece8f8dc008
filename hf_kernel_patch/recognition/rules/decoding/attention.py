"""What stands in for the cache, the masks and the attention while a token is captured.

The model's code asks its cache for keys and values, transformers for masks, and hands both to an
attention function. Here the cache gives out names for what it holds, tensors of NaN without memory
of their own; the masks are those that transformers would make, for each slot of the memory; and
what takes the place of the attention function knows the names and computes on the memory itself.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.recognition.rules.decoding.call import CannotCapture
from hf_kernel_patch.recognition.rules.decoding.eager_code import extras_of
from hf_kernel_patch.recognition.rules.decoding.memory import Kind
from hf_kernel_patch.recognition.rules.decoding.slots import Slots

if TYPE_CHECKING:
    import torch
    from torch import nn

#: A mapping, a name in it, and what it holds: a function that code looks up when it runs.
Entry = tuple[MutableMapping[str, Any], str, Any]
#: One capture at a time: entries are exchanged for as long as it lasts.
_exchanging = threading.Lock()
_EAGER = "eager_attention_forward"


class StandIn:
    """Cache, masks and attention of one captured token of each of ``batch`` sequences.

    ``position`` (1,) is the token's, on the device; ``op`` is decode_attention.
    """

    def __init__(
        self,
        op: Callable[..., torch.Tensor],
        slots: Slots,
        shown: Any,
        position: torch.Tensor,
        batch: int,
    ):
        self._op, self._slots, self._position, self._batch = op, slots, position, batch
        self._layers = [
            _layer_class()(self, index, kind, bool(layer.is_sliding))
            for index, (kind, layer) in enumerate(zip(slots.kinds, shown.layers))
        ]
        #: Layers whose new key and value wait for their attention.
        self._new: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        #: id of a mask that was made -> it, and the op's form of it.
        self._masks: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def cache(self) -> Any:
        """A cache for the model's code."""
        from transformers.cache_utils import Cache

        return Cache(layers=list(self._layers))

    @property
    def position(self) -> torch.Tensor:
        """The token's position, a tensor without dimensions."""
        return self._position.view(())

    def names_of(self, kind: Kind) -> tuple[torch.Tensor, torch.Tensor]:
        """What keys and values of a layer are called while the model's code has them."""
        nan = self._position.new_full((1,), float("nan"), dtype=kind.dtype)
        keys, values = (
            nan.expand(self._batch, kind.heads, kind.size, width)
            for width in (kind.key_dim, kind.value_dim)
        )
        return keys, values

    def update(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """A layer's code has computed the token's key and value."""
        if key.shape[2] != 1 or index in self._new:
            raise CannotCapture("a layer adds more than one token to its cache")
        self._new[index] = key, value

    def attend(self, original: Any, module: nn.Module, *given: Any, **options: Any) -> Any:
        """In place of an attention function of transformers, which is ``original``."""
        if len(given) not in (3, 4) or options.get("dropout"):
            raise CannotCapture("attention is called in another way than known")
        query, key, value = given[:3]
        mask = given[3] if len(given) == 4 else options.get("attention_mask")
        extras = extras_of(original)
        if extras is None:
            raise CannotCapture(f"the attention function {original.__qualname__} is not known")
        index = next((i for i, one in enumerate(self._layers) if one.keys is key), None)
        if index is None or self._layers[index].values is not value:
            raise CannotCapture("attention is given other keys than those of the cache")
        if options.get("position_bias") is not None or options.get("head_mask") is not None:
            raise CannotCapture("attention is given a bias or a mask of heads")
        kind = self._slots.kinds[index]
        assert kind is not None
        allowed = None
        if mask is not None:
            made = self._masks.get(id(mask), (None, None))
            if made[0] is not mask or mask.shape[-1] != kind.size:
                raise CannotCapture("attention is given another mask than transformers made")
            allowed = made[1]
        key, value = self._new.pop(index, (None, None))
        out = self._op(
            query,
            key,
            value,
            self._slots.layers[index],
            self._position,
            kind.size,
            allowed,
            options.get("scaling"),
            options.get("softcap") if extras.softcap else None,
            module.sinks if extras.sinks else None,
        )
        return out, None

    def mask(
        self,
        batch_size: int,
        kv_length: int,
        mask_function: Any,
        attention_mask: torch.Tensor | None = None,
        use_vmap: bool = False,
        **_: Any,
    ) -> torch.Tensor | None:
        """In place of what makes masks: (B, 1, 1, slots), which slots the token attends to."""
        import torch
        from transformers.masking_utils import causal_mask_function

        if not isinstance(kv_length, _Size) or use_vmap:
            raise CannotCapture("masks are made in another way than known")
        if mask_function is causal_mask_function and attention_mask is None:
            return None  # as the op attends to nothing behind the token
        device = self._position.device
        rows = torch.arange(batch_size, device=device).view(-1, 1, 1, 1)
        layer = self._slots.layers[kv_length.layer]
        assert layer is not None
        places = torch.arange(int(kv_length), device=device) + layer.address[3]
        places = places.view(1, 1, 1, -1)
        query = self._position.view(1, 1, 1, 1)
        allowed = mask_function(rows, torch.zeros_like(query), query, places)
        allowed = allowed.expand(max(allowed.shape[0], 1), 1, 1, -1)
        if attention_mask is not None:
            last = attention_mask.shape[1] - 1
            allowed = allowed & attention_mask[rows, places.clamp(max=last)]
        found = allowed.expand(batch_size, 1, 1, -1)
        self._masks[id(found)] = found, allowed[:, 0, 0].contiguous()
        return found

    @contextmanager
    def running(self) -> Iterator[None]:
        """One run of the model's code; raises CannotCapture where it left something behind."""
        self._new.clear()
        self._masks.clear()
        try:
            yield
            if self._new:
                raise CannotCapture("a layer's new key and value met no known attention")
        finally:
            self._new.clear()
            self._masks.clear()

    @contextmanager
    def in_place(self, entries: Iterable[Entry]) -> Iterator[None]:
        """Stand in for the functions of these entries, in this thread."""
        thread = threading.get_ident()
        with _exchanging, ExitStack() as stack:
            for mapping, name, original in entries:
                makes_masks = _makes_masks(mapping)
                ours = self.mask if makes_masks else _first(self.attend, original)
                stack.enter_context(_exchanged(mapping, name, _dispatch(thread, ours, original)))
            yield


class _Size(int):
    """How many slots a layer's mask has, and which layer's."""

    layer: int


@cache
def _layer_class() -> Any:
    """The class of the stand-in's layers; transformers is not imported before it is needed."""
    from transformers.cache_utils import CacheLayerMixin

    class Layer(CacheLayerMixin):
        is_compileable = True
        is_croppable = False

        def __init__(self, owner: StandIn, index: int, kind: Kind | None, sliding: bool):
            super().__init__()
            self.owner, self.index, self.is_sliding = owner, index, sliding
            self.is_initialized = kind is not None
            if kind is not None:
                self.keys, self.values = owner.names_of(kind)
                self.device, self.dtype = self.keys.device, kind.dtype
                self.slots = _Size(kind.size)
                self.slots.layer = index
                if sliding:
                    self.sliding_window = kind.window

        def lazy_initialization(self, *_: object, **__: object) -> None:
            raise CannotCapture("a layer of the cache is empty")

        def update(self, key: Any, value: Any, *_: object, **__: object) -> tuple[Any, Any]:
            if not self.is_initialized:
                raise CannotCapture("a layer of the cache is empty")
            self.owner.update(self.index, key, value)
            return self.keys, self.values

        def get_mask_sizes(self, *_: object) -> tuple[int, int]:
            if not self.is_initialized:
                raise CannotCapture("a layer of the cache is empty")
            return self.slots, 0

        def get_seq_length(self, *_: object) -> Any:
            return self.owner.position

        def get_max_length(self) -> int:
            return -1

        get_max_cache_shape = get_max_length

    return Layer


def entries_of(modules: Iterable[nn.Module]) -> list[Entry]:
    """The attention functions and makers of masks that the code of these modules looks up."""
    names = {
        name
        for module in modules
        if isinstance(name := getattr(vars(module).get("config"), "_attn_implementation", 0), str)
    }
    if unknown := sorted(names - {"sdpa", "eager"}):
        raise CannotCapture(f"the attention implementation {unknown[0]} has no graph")
    masks = getattr(sys.modules.get("transformers.masking_utils"), _MASKS, None)
    if masks is None or not names:
        raise CannotCapture("this transformers makes masks in another way than known")
    found: dict[tuple[int, str], Entry] = {}
    scopes = {id(s): s for m in modules if (s := _scope_of(type(m))) is not None}
    for scope in scopes.values():
        registry = scope.get("ALL_ATTENTION_FUNCTIONS")
        if isinstance(registry, MutableMapping) and "sdpa" in names:
            found[id(registry), "sdpa"] = registry, "sdpa", true_value(registry["sdpa"])
        if "eager" in names and _EAGER in scope:
            found[id(scope), _EAGER] = scope, _EAGER, true_value(scope[_EAGER])
    return [*found.values(), *((masks, name, true_value(masks[name])) for name in sorted(names))]


_MASKS = "ALL_MASK_ATTENTION_FUNCTIONS"


def _makes_masks(mapping: object) -> bool:
    return type(mapping).__name__ == "AttentionMaskInterface"


def _scope_of(cls: type) -> dict[str, Any] | None:
    return getattr(sys.modules.get(cls.__module__), "__dict__", None)


def _first(function: Callable[..., Any], first: object) -> Callable[..., Any]:
    return lambda *arguments, **options: function(first, *arguments, **options)


def _dispatch(thread: int, ours: Any, original: Any) -> Any:
    """Ours in one thread, the original in all others."""

    def dispatch(*arguments: Any, **options: Any) -> Any:
        own = threading.get_ident() == thread
        return (ours if own else original)(*arguments, **options)

    dispatch.stands_for = original  # type: ignore[attr-defined]
    return dispatch


def true_value(value: Any) -> Any:
    """What a registry holds, even while another thread captures."""
    return getattr(value, "stands_for", value)


@contextmanager
def _exchanged(mapping: MutableMapping[str, Any], name: str, value: object) -> Iterator[None]:
    """Another value for a while; registries of transformers have it in a mapping of their own."""
    own = getattr(mapping, "_local_mapping", mapping)
    missing = object()
    before = own.get(name, missing)
    own[name] = value
    try:
        yield
    finally:
        if before is missing:
            del own[name]
        else:
            own[name] = before
