"""What strangers wrote as programs has bounds: processor time, memory, text."""

from __future__ import annotations

import resource
from typing import Any

import pytest

from llama4_convert.checkpoints.confined import Stopped, confined
from llama4_convert.planning.adapter_config import match_paths
from llama4_convert.validation.chat_template import DIALOGS, rendered

ADAPTER_CONFIG = "llama4_convert.planning.adapter_config"
PATHS = ["model.layers.0.self_attn.q_proj", "q_proj", "model.layers.10.self_attn.k_proj"]


def matched(*patterns: str) -> Any:
    return confined(ADAPTER_CONFIG, "match_paths", [patterns, PATHS])


@pytest.mark.parametrize(
    "patterns",
    [
        ["q_proj"],
        ["proj"],
        [r"layers\.0\..*", "q_proj"],
        ["layers.[01]+.self_attn.[qk]_proj"],
        ["a|q_proj"],
        ["q_proj$|x", "(?P<name>q)_proj"],
        [r"\1q_proj", r"(k)_proj"],
        ["a)|(q_proj"],
    ],
)
def test_patterns_mean_what_they_mean_to_peft(patterns: list[str]) -> None:
    other = pytest.importorskip("peft.utils.other")
    expected = [other.get_pattern_key(patterns, path) for path in PATHS]
    assert [path if i is None else patterns[i] for path, i in zip(PATHS, matched(*patterns), strict=True)] == expected
    assert matched(*patterns) == match_paths((patterns, PATHS))


@pytest.mark.parametrize("pattern", ["(", "(?i)q_proj", "q_proj)", "a{99999999999999}", "(" * 5000 + ")" * 5000])
def test_what_is_no_expression_where_peft_puts_it_is_refused(pattern: str) -> None:
    with pytest.raises(Stopped, match=r"no regular expression|nested too deeply"):
        matched(pattern)


@pytest.mark.parametrize(
    "pattern", [r"(([a-z_.0-9])+)+X", r"(.*)*.*(.*)*X", "(?:a|a|[a-z])*(?:[a-z]|[a-z.])*(.?){40}X"]
)
def test_an_expression_that_would_never_end_is_stopped(pattern: str) -> None:
    with pytest.raises(Stopped, match="does not end within 3 s"):
        matched(pattern)


LOOP = "{% for i in range(99999) %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOP * 3 + "{% endfor %}" * 3, "does not end"),
        ("{{ 9 ** (9 ** 9) }}", "does not end"),
        ("{{ 'a' * 10 ** 10 }}", "128 MiB"),
        ("{% set x = 'a' * 10 ** 8 %}{{ x + x + x }}", "128 MiB"),
        ("{{ '%10000000000d' % 1 }}", "128 MiB"),
        ("{{ '{:10000000000}'.format(1) }}", "128 MiB"),
        (LOOP + "{{ 'a' * 50 }}{% endfor %}", "more text than any needs"),
        ("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "nested too deeply"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ raise_exception('a\x1b') }}", "ValueError: a"),
        ("{{", "TemplateSyntaxError"),
    ],
)
def test_a_template_has_bounds(template: str, message: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(ValueError, match=message):
        rendered(template)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


def test_a_template_gets_what_it_needs() -> None:
    assert rendered("{{ messages | length }}{{ 'a' * 10**6 }}") == ["1" + "a" * 10**6, "4" + "a" * 10**6]
    assert len(DIALOGS) == 2
