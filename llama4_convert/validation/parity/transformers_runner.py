"""A model run by Transformers, which nobody can say shares our mistakes, and what its layers made, by our names of the stages."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama4_convert.errors import EnvironmentFailed, UsageError, one_line
from llama4_convert.files import json_object
from llama4_convert.validation.parity.walk import CandidateFailed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llama4_convert.validation.parity.prompts import Batch
    from llama4_convert.validation.parity.stages import Step


def load_transformers(path: Path, dtype: torch.dtype | str = "auto") -> Any:
    """The model of a directory. Raises UsageError without Transformers, CandidateFailed for a directory it does not take.

    A tensor that is missing or misshapen fails here: Transformers itself warns and fills it with random numbers.
    """
    body = json_object(path / "config.json")
    name = "Llama4ForConditionalGeneration" if "text_config" in body else "Llama4ForCausalLM"
    try:
        import transformers

        kind = getattr(transformers, name)
    except ImportError as error:  # also raised for a package that Transformers finds and cannot use
        raise UsageError(
            f"Transformers cannot be used here ({one_line(error, 150)}): pip install 'llama4-convert[transformers]'"
        ) from error
    try:
        # It reports problems in tables on the terminal; they come back from here as an error.
        with quiet():
            loaded: Any = kind.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except ImportError as error:  # what it needs for a quantized directory
        raise EnvironmentFailed(
            f"Transformers needs a package for {path} ({one_line(error, 150)}): pip install 'llama4-convert[quantized]'"
        ) from error
    except Exception as error:  # it raises of every kind, about whatever its config classes check
        raise CandidateFailed(f"Transformers refuses it: {one_line(error)}") from error
    model, info = loaded
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info.get(problem):
            keys = sorted(str(key) for key in info[problem])
            raise CandidateFailed(f"Transformers reports {problem.replace('_', ' ')}: {', '.join(keys[:3])}")
    return model.eval()


class TransformersRecord:
    """A directory run by Transformers on a batch, each prompt alone and without padding.

    What stages made is kept in memory, as the model is; `logits` [real positions, vocabulary] in their order. `modules` runs the
    first prompt again to look into a layer.
    """

    def __init__(self, path: Path, batch: Batch, dtype: torch.dtype) -> None:
        """Raises UsageError, EnvironmentFailed or CandidateFailed."""
        import torch

        self._model, self._batch, self._dtype = load_transformers(path, dtype), batch, dtype
        made: dict[str, list[Step]] = {}
        logits = []
        with self._seen(lambda stage, step: made.setdefault(stage, []).append(step)):
            for prompt in batch.prompts:
                logits.append(self._run(prompt))
        self.logits = torch.cat(logits)
        self._steps = {stage: self._joined(stage, steps) for stage, steps in made.items()}

    def step(self, stage: str) -> Step | None:
        return self._steps.get(stage)

    def modules(self, layer: int) -> dict[str, tuple[list[Tensor], Tensor]]:
        """What the modules of a layer were given and made, of the first prompt; only those that are modules there, too."""
        found: dict[str, tuple[list[Tensor], Tensor]] = {}
        block = self._decoder().layers[layer]
        hooks = []
        for name, path in _MODULES.items():
            with contextlib.suppress(AttributeError):  # experts that a quantizer has replaced
                module = block.get_submodule(path)
                hooks.append(module.register_forward_hook(_keep(found, name)))
        try:
            self._run(self._batch.prompts[0])
        finally:
            for hook in hooks:
                hook.remove()
        return _by_our_names(found)

    def _run(self, prompt: Any) -> Tensor:
        import torch

        extra = {} if prompt.pixel_values is None else {"pixel_values": prompt.pixel_values.to(self._dtype)}
        try:
            with quiet():  # of decompression, at the first forward
                logits: Tensor = self._model(torch.tensor([prompt.tokens]), **extra).logits[0]
        except Exception as error:  # whatever a wrong configuration leads it to
            raise CandidateFailed(f"Transformers fails on it: {one_line(error)}") from error
        return logits

    def _decoder(self) -> Any:
        return getattr(self._model, "language_model", self._model).model

    @contextlib.contextmanager
    def _seen(self, keep: Callable[[str, Step], None]) -> Iterator[None]:
        """Tells each stage that the model goes through."""
        from llama4_convert.validation.parity.stages import Step

        decoder, vision = self._decoder(), getattr(self._model, "vision_model", None)
        scores: list[Tensor] = []
        stages = {f"layers.{i}": layer for i, layer in enumerate(decoder.layers)} | {"norm": decoder.norm}
        if vision is not None:
            stages |= {"vision.embed": vision.layernorm_pre}
            stages |= {f"vision.layers.{i}": layer for i, layer in enumerate(vision.model.layers)}
            stages |= {"vision.adapter": vision.vision_adapter, "vision.projector": self._model.multi_modal_projector}

        def seen(stage: str) -> Callable[..., None]:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                state = output[0] if isinstance(output, tuple) else output
                if stage == "vision.embed":  # [tiles, chunks of 1, patches, width] there
                    state = state.flatten(0, -3)
                keep(stage, Step(state, scores.pop() if scores else None))

            return hook

        hooks = [module.register_forward_hook(seen(stage)) for stage, module in stages.items()]
        hooks.append(
            decoder.layers[0].register_forward_pre_hook(
                lambda module, inputs, named: keep("embed", Step(inputs[0] if inputs else named["hidden_states"])),
                with_kwargs=True,
            )
        )
        for layer in decoder.layers:
            router = getattr(layer.feed_forward, "router", None)
            if router is not None:
                hooks.append(router.register_forward_hook(lambda module, inputs, output: scores.append(output[1])))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _joined(self, stage: str, steps: list[Step]) -> Step:
        """The prompts' states as one batch, padded with zeros as `Batch` pads; vision's side by side."""
        import torch

        from llama4_convert.validation.parity.stages import Step

        if stage.startswith("vision."):
            return Step(torch.cat([step.state for step in steps]))
        length = self._batch.tokens.shape[1]

        def padded(rows: list[Tensor]) -> Tensor:
            return torch.stack([torch.nn.functional.pad(r, (0, 0, 0, length - len(r))) for r in rows])

        scores = [step.scores for step in steps if step.scores is not None]
        return Step(padded([step.state[0] for step in steps]), padded(scores).flatten(0, 1) if scores else None)


# Our names of a layer's modules, and theirs; "experts" are one there, and "attention" is none.
_MODULES = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward": "feed_forward",
    "feed_forward.router": "feed_forward.router",
    "feed_forward.shared": "feed_forward.shared_expert",
    "experts": "feed_forward.experts",
}


def _keep(found: dict[str, tuple[list[Tensor], Tensor]], name: str) -> Callable[..., None]:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        if inputs:
            out = output[-1 if name == "feed_forward.router" else 0] if isinstance(output, tuple) else output
            found[name] = [inputs[0]], out.clone()  # the routed experts are added to the shared one's in place

    return hook


def _by_our_names(found: dict[str, tuple[list[Tensor], Tensor]]) -> dict[str, tuple[list[Tensor], Tensor]]:
    """With "attention" from its projections, and each expert from what they are all given: a block of rows each."""
    qkv = [found[f"attention.{name}"][1] for name in "qkv" if f"attention.{name}" in found]
    if len(qkv) == 3 and "attention.o" in found:
        found["attention"] = qkv, found["attention.o"][0][0]
    experts = found.pop("experts", None)
    router = found.get("feed_forward.router")
    if router is not None:
        found.pop("feed_forward", None)
        if experts is not None:
            (given,), made = experts
            n = router[1].shape[-1]
            blocks = zip(given.view(n, -1, given.shape[-1]), made.view(n, -1, made.shape[-1]), strict=True)
            for expert, (x, y) in enumerate(blocks):
                sent = x.any(-1)  # the others' inputs are scaled by 0
                if bool(sent.any()):
                    found[f"feed_forward.experts.{expert}"] = [x[sent]], y[sent]
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Transformers without its tables, bars and warnings; what is wrong it also raises, or we ask for."""
    from transformers.utils import logging

    log: Any = logging
    verbosity = log.get_verbosity()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.set_verbosity(verbosity)
        log.enable_progress_bar()
