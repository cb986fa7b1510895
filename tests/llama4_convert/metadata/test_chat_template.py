"""The chat templates: ids against Meta's ChatFormat where both define them, text where only one does."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from llama4_convert.metadata.tokenizer import tokenizer_files
from tests.support import torchvision_shim

torchvision_shim.install()

import llama_models  # noqa: E402
from llama_models.datatypes import RawMediaItem, RawMessage, RawTextItem, StopReason, ToolCall  # noqa: E402
from llama_models.llama4 import tokenizer as meta_tokenizer  # noqa: E402
from llama_models.llama4.args import Size, VisionArgs  # noqa: E402
from llama_models.llama4.chat_format import ChatFormat  # noqa: E402
from transformers import Llama4ImageProcessor, Llama4Processor  # noqa: E402

MODEL = Path(meta_tokenizer.__file__).parent / "tokenizer.model"
META = ChatFormat(meta_tokenizer.Tokenizer.get_instance())

Message = dict[str, Any]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("instruct")
    files = tokenizer_files(MODEL.read_bytes(), variant="instruct", vision=True, max_length=1_048_576)
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


@pytest.fixture(scope="module")
def chat(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("guard")
    for name, content in tokenizer_files(small_model(), variant="guard", vision=True, max_length=8192).items():
        (path / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(path)


def small_model() -> bytes:
    """A vocabulary of single bytes: enough where only the text of a prompt is looked at."""
    import base64

    return b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))


def text(tokenizer: Any, messages: list[Message], **variables: Any) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **variables)


def call(name: str, arguments: Any) -> Message:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def meta_message(message: Message) -> RawMessage:
    """The same message in Meta's types. A message that calls tools is out of message, all others out of turn."""
    content = message["content"]
    if isinstance(content, list):
        content = [RawTextItem(text=part["text"]) for part in content]
    calls = [
        ToolCall(call_id="0", tool_name=c["function"]["name"], arguments=c["function"]["arguments"])
        for c in message.get("tool_calls", [])
    ]
    role = "tool" if message["role"] == "ipython" else message["role"]
    return RawMessage(role=role, content=content or "", tool_calls=calls, stop_reason=StopReason.end_of_turn)


def meta_ids(messages: list[Message]) -> list[int]:
    return META.encode_dialog_prompt([meta_message(message) for message in messages]).tokens


def our_ids(chat: Any, messages: list[Message]) -> list[int]:
    return chat.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


# --- chat.jinja: the ids of Meta's encode_dialog_prompt ---

USER = {"role": "user", "content": "What is the weather in Zürich?"}
DIALOGS: list[list[Message]] = [
    [USER],
    [{"role": "system", "content": "You are a helpful assistant"}, USER],
    [USER, {"role": "assistant", "content": "Sunny."}, {"role": "user", "content": "  thanks  \n\n"}],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": "\t"}],
    [USER, USER, {"role": "system", "content": "late"}, {"role": "assistant", "content": " a"}],
    [{"role": "user", "content": [{"type": "text", "text": "one part\n"}]}],
    [{"role": "user", "content": []}],
    [USER, {"role": "assistant", "content": "", "tool_calls": [call("weather", {"city": "Zürich", "days": [1, 2.5]})]}],
    [USER, {"role": "assistant", "content": None, "tool_calls": [call("now", {})]}],
    [
        USER,
        {"role": "assistant", "content": "Let me see", "tool_calls": [call("photogen", {"query": q}) for q in "ab"]},
    ],
    [USER, {"role": "assistant", "content": None, "tool_calls": [call("brave_search", {"query": 'say "<&>" é'})]}],
    [USER, {"role": "assistant", "content": None, "tool_calls": [call("wolfram_alpha", {"query": "1+1"})]}],
    [USER, {"role": "assistant", "content": None, "tool_calls": [call("photogen", {"query": 7})]}],
    [USER, {"role": "assistant", "content": None, "tool_calls": [call("code_interpreter", {"code": "print(1)\n"})]}],
    [USER, {"role": "assistant", "content": None, "tool_calls": [call('odd "name" é', {"k": {"<'>": "\u2028😀"}})]}],
    [USER, {"role": "tool", "content": '{"temperature": 21}'}, {"role": "ipython", "content": "done"}],
]


@pytest.mark.parametrize("messages", DIALOGS)
def test_ids_are_metas(chat: Any, messages: list[Message]) -> None:
    assert our_ids(chat, messages) == meta_ids(messages)


def random_dialog(rng: random.Random) -> list[Message]:
    pieces = [
        "a",
        "B",
        " ",
        "é",
        "\u4e2d\u6587",
        "1234",
        "\n",
        "\r\n\r\n",
        "'s",
        "…",
        "\t",
        "<",
        "|>",
        "{",
        '"',
        "x" * 30,
    ]

    def content() -> str:
        # Whitespace in front could reach the header's line breaks: the one thing that Meta's ids show and text cannot.
        return "".join(rng.choice(pieces) for _ in range(rng.randrange(12))).lstrip()

    def message() -> Message:
        role = rng.choice(["system", "user", "user", "assistant", "assistant", "tool"])
        if role != "assistant" or rng.random() < 0.5:
            return {"role": role, "content": content()}
        arguments = {content(): content() for _ in range(rng.randrange(3))}
        return {"role": role, "content": None, "tool_calls": [call(content(), arguments)]}

    return [message() for _ in range(rng.randrange(1, 8))]


def test_ids_of_a_thousand_random_dialogs_are_metas(chat: Any) -> None:
    rng = random.Random(0)
    for _ in range(1_000):
        messages = random_dialog(rng)
        assert our_ids(chat, messages) == meta_ids(messages), messages


def test_ids_of_images_are_metas(chat: Any) -> None:
    from PIL import Image

    photo = Image.open(Path(llama_models.__file__).parent / "resources" / "dog.jpg").convert("RGB")
    images = [photo.resize((500, 300)), photo.resize((200, 200))]  # several tiles, and one

    def png(image: Image.Image) -> RawMediaItem:
        file = io.BytesIO()
        image.save(file, "PNG")
        return RawMediaItem(data=file.getvalue())

    vision = VisionArgs(
        image_size=Size(height=336, width=336),
        patch_size=Size(height=14, width=14),
        pixel_shuffle_ratio=0.5,
        **dict.fromkeys(("dim", "n_layers", "n_heads", "mlp_ratio", "output_dim"), 1),
    )
    meta = ChatFormat(meta_tokenizer.Tokenizer.get_instance(), vision)
    expected = meta.encode_dialog_prompt(
        [RawMessage(role="user", content=[png(images[0]), png(images[1]), RawTextItem(text=" Which is larger?")])]
    )
    processor = Llama4Processor(Llama4ImageProcessor(), chat, chat_template=chat.chat_template)
    parts = [{"type": "image", "image": image} for image in images]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*parts, {"type": "text", "text": " Which is larger?"}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    (ids,) = inputs["input_ids"]
    assert list(ids) == expected.tokens


def test_without_a_generation_prompt_the_last_message_ends_the_text(chat: Any) -> None:
    assert text(chat, [USER]).endswith("Zürich?<|eot|>")


def test_continuing_a_message(chat: Any) -> None:
    messages = [USER, {"role": "assistant", "content": '{"name": "'}]
    assert text(chat, messages, continue_final_message=True).endswith('assistant<|header_end|>\n\n{"name": "')


def test_the_text_of_all_roles(chat: Any) -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "U"}, {"type": "image"}]},
        {
            "role": "assistant",
            "content": "A",
            "tool_calls": [call("f", {"x": "é<"}), call("brave_search", {"query": "q"})],
        },
        {"role": "tool", "content": "T"},
    ]
    assert text(chat, messages, add_generation_prompt=True) == (
        "<|begin_of_text|><|header_start|>system<|header_end|>\n\nS<|eot|>"
        "<|header_start|>user<|header_end|>\n\n<|image|>U<|image|><|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n"
        'A{"type": "function", "name": "f", "parameters": {"x": "\\u00e9<"}}brave_search.call(query="q")<|eom|>'
        "<|header_start|>ipython<|header_end|>\n\nT<|eom|>"
        "<|header_start|>assistant<|header_end|>\n\n"
    )


@pytest.mark.parametrize(("arguments", "written"), [('{"x":1}', '{"x":1}'), ("", "{}"), (None, "{}")])
def test_arguments_as_a_json_string_stay_as_they_are(chat: Any, arguments: Any, written: str) -> None:
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call("f", arguments)]}]
    assert text(chat, messages).endswith('{"type": "function", "name": "f", "parameters": ' + written + "}<|eom|>")


# --- chat.jinja: tool definitions ---

TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Wetter für <city>", "parameters": {"type": "object"}},
}
CONTRACT = '{"name": function name, "parameters": dictionary of argument name and its value}'


def sections(prompt: str) -> list[tuple[str, str]]:
    """(role, content) of each message."""
    parts = prompt.removeprefix("<|begin_of_text|>").split("<|header_start|>")[1:]
    return [tuple(part.split("<|header_end|>\n\n")) for part in parts]  # type: ignore[misc]


def test_tools_go_in_front_of_the_first_user_message(chat: Any) -> None:
    system = {"role": "system", "content": "S"}
    plain = sections(text(chat, [system, USER, USER]))
    with_tools = sections(text(chat, [system, USER, USER], tools=[TOOL, TOOL]))
    assert (with_tools[0], with_tools[2]) == (plain[0], plain[2])
    prefix = with_tools[1][1].removesuffix(plain[1][1])
    assert prefix.count(json.dumps(TOOL, indent=4, ensure_ascii=False)) == 2
    assert CONTRACT in prefix
    assert prefix.endswith("\n\n")


def test_tools_go_in_front_of_a_content_list_too(chat: Any) -> None:
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "U"}]}
    assert text(chat, [message], tools=[TOOL]).endswith("\n\n<|image|>U<|eot|>")


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "S"}]])
def test_tools_go_into_the_system_message_if_told(chat: Any, system: list[Message]) -> None:
    made = sections(text(chat, [*system, USER], tools=[TOOL], tools_in_user_message=False))
    assert [role for role, _ in made] == ["system", "user"]
    assert CONTRACT in made[0][1]
    assert made[0][1].endswith("\n\nS<|eot|>" if system else "\n\n<|eot|>")
    assert made[1][1] == USER["content"] + "<|eot|>"


@pytest.mark.parametrize("tools", [None, []])
def test_no_tools_no_text(chat: Any, tools: Any) -> None:
    assert text(chat, [USER], tools=tools) == text(chat, [USER])


@pytest.mark.parametrize(
    ("messages", "tools", "message"),
    [
        ([{"role": "developer", "content": "x"}], None, "Unknown role developer"),
        ([{"role": "user", "content": None}], None, "a string or a list of parts"),
        ([{"role": "user"}], None, "a string or a list of parts"),
        ([{"role": "tool", "content": {"a": 1}}], None, "a string or a list of parts"),
        ([{"role": "user", "content": [{"type": "audio"}]}], None, "type text or image, not audio"),
        ([{"role": "user", "content": "x", "tool_calls": [call("f", {})]}], None, "Only an assistant message"),
        ([{"role": "system", "content": "x"}], [TOOL], "there is none"),
        ([{"role": "assistant", "content": "", "tool_calls": [call("brave_search", "{}")]}], None, "the key query"),
        ([{"role": "assistant", "content": "", "tool_calls": [call("code_interpreter", {})]}], None, "the key code"),
    ],
)
def test_what_cannot_be_written_is_refused(chat: Any, messages: list[Message], tools: Any, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        text(chat, messages, tools=tools)


def test_known_limits_the_text_is_metas_where_the_ids_are_not(chat: Any) -> None:
    line_breaks_first = {"role": "user", "content": "\n\nfoo"}
    two_texts = {"role": "user", "content": [{"type": "text", "text": "foo"}, {"type": "text", "text": "bar"}]}
    two_calls = {"role": "assistant", "content": "", "tool_calls": [call("a", {"x": None}), call("b", {})]}
    for message in (line_breaks_first, two_texts, two_calls):
        ours, metas = our_ids(chat, [message]), meta_ids([message])
        assert ours != metas
        assert chat.decode(ours) == chat.decode(metas)
    # Text that spells a special token: one token for us, plain text for Meta.
    assert our_ids(chat, [{"role": "user", "content": "<|eot|>"}]).count(chat.eos_token_id) == 2


# --- guard.jinja ---

GUARD_TEXT = """\
<|begin_of_text|><|header_start|>user<|header_end|>

Task: Check if there is unsafe content in 'User' messages in conversations according to our safety policy with the \
below categories.

<BEGIN UNSAFE CONTENT CATEGORIES>
S1: Violent Crimes.
S2: Non-Violent Crimes.
S3: Sex Crimes.
S4: Child Exploitation.
S5: Defamation.
S6: Specialized Advice.
S7: Privacy.
S8: Intellectual Property.
S9: Indiscriminate Weapons.
S10: Hate.
S11: Self-Harm.
S12: Sexual Content.
S13: Elections.
S14: Code Interpreter Abuse.
<END UNSAFE CONTENT CATEGORIES>

<BEGIN CONVERSATION>

User: How do I bake bread?

<END CONVERSATION>

Provide your safety assessment for ONLY THE LAST User message in the above conversation:
 - First line must read 'safe' or 'unsafe'.
 - If unsafe, a second line must include a comma-separated list of violated categories.<|eot|>\
<|header_start|>assistant<|header_end|>

"""
ASKED = {"role": "user", "content": "How do I bake bread?"}
ANSWERED = {"role": "assistant", "content": [{"type": "text", "text": " With flour."}]}
S14 = "S14: Code Interpreter Abuse.\n"


def test_a_prompt_is_judged(guard: Any) -> None:
    assert text(guard, [ASKED]) == text(guard, [ASKED], add_generation_prompt=True) == GUARD_TEXT


def test_a_reply_is_judged(guard: Any) -> None:
    expected = GUARD_TEXT.replace("'User'", "'Agent'").replace("LAST User", "LAST Agent")
    expected = expected.replace("bread?\n\n", "bread?\n\nAgent:  With flour.\n\n")
    assert text(guard, [ASKED, ANSWERED]) == expected


def test_images_come_first_in_their_turn_and_rule_out_the_text_only_category(guard: Any) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": ASKED["content"]}, {"type": "image"}]
    expected = GUARD_TEXT.replace("User: How", "User: <|image|><|image|>How").replace(S14, "")
    assert text(guard, [{"role": "user", "content": parts}]) == expected


def test_categories_can_be_left_out_or_replaced(guard: Any) -> None:
    without = text(guard, [ASKED], excluded_category_keys=["S1", "S14"])
    assert without == GUARD_TEXT.replace("S1: Violent Crimes.\n", "").replace(S14, "")
    replaced = text(guard, [ASKED], categories={"S1": "Spoilers.", "S14": "Puns."}, excluded_category_keys=["S1"])
    assert "CATEGORIES>\nS14: Puns.\n<END" in replaced


@pytest.mark.parametrize(
    ("messages", "variables", "message"),
    [
        ([{"role": "system", "content": "x"}], {}, "not one of role system"),
        ([{"role": "user", "content": None}], {}, "a string or a list of parts"),
        ([{"role": "user", "content": [{"type": "audio"}]}], {}, "type text or image, not audio"),
        ([ASKED], {"categories": {"S1": "x"}, "excluded_category_keys": ["S1"]}, "Every category is excluded"),
    ],
)
def test_what_the_guard_cannot_judge_is_refused(
    guard: Any, messages: list[Message], variables: dict[str, Any], message: str
) -> None:
    with pytest.raises(TemplateError, match=message):
        text(guard, messages, **variables)


# --- both, as other readers see them ---


@pytest.mark.parametrize("strip_blocks", [False, True])
def test_the_text_does_not_hang_on_jinjas_whitespace_settings(chat: Any, guard: Any, strip_blocks: bool) -> None:
    import jinja2

    environment = jinja2.Environment(trim_blocks=strip_blocks, lstrip_blocks=strip_blocks)
    for tokenizer in (chat, guard):
        messages = [ASKED, ANSWERED, {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
        rendered = environment.from_string(tokenizer.chat_template).render(
            messages=messages, add_generation_prompt=True
        )
        assert rendered == text(tokenizer, messages, add_generation_prompt=True)


@pytest.mark.parametrize("variant", ["instruct", "guard"])
def test_servers_see_that_content_may_be_a_list(variant: str) -> None:
    """vLLM hands over content lists, images in place, only if it finds a loop over a message's content."""
    import jinja2
    from jinja2 import nodes

    files = tokenizer_files(small_model(), variant=variant, vision=True, max_length=1)
    tree = jinja2.Environment().parse(files["chat_template.jinja"].decode())

    def is_content_of_message(node: nodes.Node) -> bool:
        return isinstance(node, nodes.Getattr) and node.attr == "content" and node.node.name == "message"  # type: ignore[attr-defined]

    assert any(is_content_of_message(loop.iter) for loop in tree.find_all(nodes.For))
