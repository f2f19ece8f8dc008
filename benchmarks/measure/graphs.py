"""One CUDA graph of a forward of one token, as transformers has it, replayed without generate."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from benchmarks.workloads import models
from benchmarks.workloads.variants import Variant

_WARM = 3


class Replaying:
    """Greedy decoding with a static cache; a token is a replay, and stays on the device."""

    def __init__(self, job: dict[str, Any], variant: Variant, model: Any):
        from transformers import StaticCache

        model.eval()
        self.model, self.ids = model, models.token_ids(job, job["prompt"])
        length = job["prompt"] + max(job["new"], _WARM + 2)
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.cached = {models.cache_name(model): self.cache}
        batch, device = len(self.ids), self.ids.device
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.places = torch.arange(length, device=device)
        self.tokens = torch.zeros(batch, length + 1, dtype=torch.long, device=device)
        self.graph: Any = None

    def prefill(self) -> Any:
        """Read the prompts into the cache and choose the first token."""
        length = self.ids.shape[1]
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.cumulative_length.zero_()
        positions = torch.arange(length, device=self.ids.device)[None]
        logits = self.model(
            self.ids,
            position_ids=positions,
            **self.cached,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        self.tokens[:, :length].copy_(self.ids)
        self.position.fill_(length)
        self._choose(logits)
        return logits

    def step(self) -> None:
        """One token: nothing in it may depend on the host, since a graph is made of it."""
        batch = len(self.token)
        mask = (self.places <= self.position).view(1, 1, 1, -1).expand(batch, 1, 1, -1)
        logits = self.model(
            self.token,
            attention_mask=mask,
            position_ids=self.position,
            **self.cached,
            use_cache=True,
        ).logits
        self.position.add_(1)
        self._choose(logits)

    def _choose(self, logits: torch.Tensor) -> None:
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.tokens.index_copy_(1, self.position[0], self.token)

    def generate(self, new: int) -> torch.Tensor:
        """The prompts and ``new`` tokens after each."""
        if self.graph is None:
            self._capture()
        self.prefill()
        for _ in range(new - 1):
            self.graph.replay()
        return self.tokens[:, : self.ids.shape[1] + new]

    def _capture(self) -> None:
        self.prefill()
        # generate has another implementation of the experts for single tokens.
        optimized = getattr(self.model, "_optimize_model_for_decode", nullcontext)
        with optimized():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM):
                    self.step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step()
        self.graph = graph
