"""Meta's directory as the source of a conversion: the plan, and the small files made of params.json and tokenizer.model."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from llama4_convert.checkpoints.manifest import Manifest
from llama4_convert.checkpoints.meta import MetaCheckpoint
from llama4_convert.checkpoints.tensors import SAFETENSORS_NAMES
from llama4_convert.conversion.job import ConversionJob, each_alone
from llama4_convert.conversion.quantization import quantization_config
from llama4_convert.conversion.request import Request, check_recipe, load_adapter, load_recipe
from llama4_convert.errors import BadInput
from llama4_convert.files import notices
from llama4_convert.metadata import config, variant
from llama4_convert.metadata.tokenizer import TokenIds, tokenizer_files
from llama4_convert.planning.planner import make_plan
from llama4_convert.streaming.job import Contents
from llama4_convert.streaming.memory import peak_memory
from llama4_convert.version import TOOL


class MetaJob(ConversionJob):
    """A conversion of Meta's directory."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.recipe = load_recipe(request.recipe) if request.recipe else None
        self.adapter = load_adapter(request.adapter)
        self.source = MetaCheckpoint.open(request.source)
        self.plan = make_plan(
            self.source,
            recipe=self.recipe,
            device=request.device,
            text_only=request.text_only,
            dtype=SAFETENSORS_NAMES[request.dtype] if request.dtype else None,
            shard_size=request.shard_size,
            allow_rank_mismatch=request.allow_rank_mismatch,
            adapter=self.adapter,
        )
        if self.recipe:
            check_recipe(self.recipe, self.plan)
        self.variant, self.variant_reason = variant.infer_variant(
            self.plan.geometry, self.plan.base_evidence, request.source
        )
        if request.variant:
            self.variant, self.variant_reason = request.variant, "you said so"
        self.max_position_embeddings = request.max_position_embeddings or variant.max_position_embeddings(
            self.variant, self.plan.geometry
        )
        self.warnings = [*self.plan.warnings, *self._vocabulary_warnings()]

    @cached_property
    def token_ids(self) -> TokenIds | None:
        """TokenIds by tokenizer.model, or by the vocabulary's size without one; None if that is too small to have any."""
        data = self.source.small_files.get("tokenizer.model")
        rows = self.plan.geometry.vocab_size or 0
        ids = TokenIds.of(data, rows)
        if ids and ids.vocab_size > rows:
            raise BadInput(
                f"tokenizer.model has {ids.vocab_size:,} tokens with the special ones,"
                f" tok_embeddings.weight only {rows:,} rows: one of the two is another model's"
            )
        return ids

    def _vocabulary_warnings(self) -> list[str]:
        found = []
        rows = self.plan.geometry.vocab_size or 0
        if "tokenizer.model" not in self.source.small_files:
            found.append(
                "the source has no tokenizer.model: no tokenizer is written, copy tokenizer.json from the model's page;"
                f" token ids in config.json are those of a vocabulary of {rows:,}"
                if self.token_ids
                else "the source has no tokenizer.model and its vocabulary is too small for Meta's special tokens:"
                " no tokenizer is written, and config.json names no token ids"
            )
        elif self.token_ids and self.token_ids.vocab_size < rows:
            found.append(
                f"the vocabulary has {rows - self.token_ids.vocab_size} more rows than tokenizer.model has tokens"
            )
        return found

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        body = config.model_config(
            self.plan.geometry,
            self.token_ids,
            variant=self.variant,
            dtype=self.plan.main_dtype,
            max_position_embeddings=self.max_position_embeddings,
        )
        if self.recipe:
            body["quantization_config"] = quantization_config(self.recipe, self.plan)
        return body

    def contents(self) -> Contents:

        g, source = self.plan.geometry, self.source
        made: dict[str, bytes] = {
            "config.json": config.to_json(self.config),
            "generation_config.json": config.to_json(config.generation_config(self.token_ids, self.variant)),
            "original/params.json": source.small_files["params.json"],
        }
        if g.vision:
            made |= {name: config.to_json(body) for name, body in config.processor_configs(g.vision).items()}
        made |= notices(source.path)
        groups = each_alone(made)
        if "tokenizer.model" in source.small_files:
            groups["tokenizer.json"] = self._tokenizer
        return groups

    def _tokenizer(self) -> dict[str, bytes]:

        return tokenizer_files(
            self.source.small_files["tokenizer.model"],
            variant=self.variant,
            vision=self.plan.geometry.vision is not None,
            max_length=self.max_position_embeddings,
        )

    def peak_memory(self, max_memory: int) -> int:

        return peak_memory(max_memory, len(self.source.small_files.get("tokenizer.model", b"")), self.plan)

    def manifest(self) -> Manifest:
        options: dict[str, Any] = {
            "dtype": self.request.dtype,
            "max_position_embeddings": self.max_position_embeddings,
            "shard_size": self.request.shard_size,
            "text_only": self.request.text_only,
            "variant": self.variant,
        }
        options |= self._recipe_options()
        source: dict[str, Any] = {"layout": "meta", "ranks": len(self.source.ranks)}
        source |= {"sha256": self.source.fingerprint(), **self._adapter_source()}
        return Manifest(TOOL, source, options, list(self.plan.meta_keys), dict(self.plan.dropped))
