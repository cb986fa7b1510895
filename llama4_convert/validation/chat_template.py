"""What a chat template makes of test dialogs."""

from __future__ import annotations

from llama4_convert.checkpoints.confined import confined

DIALOGS: tuple[tuple[bool, list[dict[str, str]]], ...] = (
    (True, [{"role": "user", "content": "Is 17 a prime?"}]),
    (
        True,
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Is 17 a prime?"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "And 18?"},
        ],
    ),
)


def rendered(template: str) -> list[str]:
    """`DIALOGS` as the template writes them. Raises ValueError for one that fails, or meets a bound (see `confined`)."""
    texts: list[str] = confined(__name__, "render", template)
    return texts


def render(template: str) -> list[str]:
    """As Transformers renders; a template is a program that nobody vouches for, and jinja2's sandbox bounds no work."""
    from jinja2 import ext, sandbox

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols]
    )
    environment.globals["strftime_now"] = lambda form: ""
    environment.globals["raise_exception"] = _raise
    made = environment.from_string(template)
    return [
        made.render(messages=messages, add_generation_prompt=prompted, bos_token="<|begin_of_text|>")
        for prompted, messages in DIALOGS
    ]


def _raise(message: str) -> None:
    raise ValueError(message)
