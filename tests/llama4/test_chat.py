"""The processor: ids and pixels of Meta's ChatFormat, and the ids of Transformers' processor."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from tests.support import torchvision_shim

torchvision_shim.install()

from llama_models.datatypes import RawMediaItem, RawMessage, RawTextItem, StopReason  # noqa: E402
from llama_models.llama4 import tokenizer as meta_tokenizer  # noqa: E402
from llama_models.llama4.args import Size, VisionArgs  # noqa: E402
from llama_models.llama4.chat_format import ChatFormat  # noqa: E402
from llama_models.llama4.datatypes import LLMInput  # noqa: E402
from transformers import Llama4ImageProcessor as TransformersImageProcessor  # noqa: E402
from transformers import Llama4Processor as TransformersProcessor  # noqa: E402

from llama4.chat import Inputs, Llama4Processor  # noqa: E402
from llama4.image import Llama4ImageProcessor  # noqa: E402
from llama4_convert.metadata.tokenizer import tokenizer_files  # noqa: E402
from llama4_convert.reference.tokenization import TextTokenizer  # noqa: E402

MODEL = Path(meta_tokenizer.__file__).parent / "tokenizer.model"
META_TOKENIZER = meta_tokenizer.Tokenizer.get_instance()
SIZE = 56

Message = dict[str, Any]


def meta_format(image_size: int = SIZE, patch_size: int = 14, ratio: float = 0.5) -> ChatFormat:
    vision = VisionArgs(
        image_size=Size(height=image_size, width=image_size),
        patch_size=Size(height=patch_size, width=patch_size),
        pixel_shuffle_ratio=ratio,
        **dict.fromkeys(("dim", "n_layers", "n_heads", "mlp_ratio", "output_dim"), 1),
    )
    return ChatFormat(META_TOKENIZER, vision)


META = meta_format()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("instruct")
    files = tokenizer_files(MODEL.read_bytes(), variant="instruct", vision=True, max_length=1_048_576)
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> TextTokenizer:
    return TextTokenizer.open(directory)


@pytest.fixture(scope="module")
def processor(tokenizer: TextTokenizer) -> Llama4Processor:
    return Llama4Processor(tokenizer, Llama4ImageProcessor(SIZE))


@pytest.fixture(scope="module")
def transformers_processor(directory: Path) -> Any:
    chat = AutoTokenizer.from_pretrained(directory)
    images = TransformersImageProcessor(size={"height": SIZE, "width": SIZE})
    return TransformersProcessor(images, chat, chat_template=chat.chat_template)


def image(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 10_007 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


ONE = image(40, 30)  # one tile
WIDE = image(150, 50)  # 1 row by 3 columns
TALL = image(50, 150)  # 3 rows by 1 column
LARGE = image(300, 200)  # many of both


def png(image: Image.Image) -> RawMediaItem:
    file = io.BytesIO()
    image.save(file, "PNG")
    return RawMediaItem(data=file.getvalue())


def meta_content(content: Any) -> Any:
    """The same content in Meta's types."""

    def item(part: Any) -> RawTextItem | RawMediaItem:
        if isinstance(part, str):
            return RawTextItem(text=part)
        return RawTextItem(text=part["text"]) if part["type"] == "text" else png(part["image"])

    return content if isinstance(content, str) else [item(part) for part in content]


def meta_dialog(messages: Sequence[Message], meta: ChatFormat = META) -> LLMInput:
    return meta.encode_dialog_prompt(
        [
            RawMessage(
                role="tool" if message["role"] == "ipython" else message["role"],
                content=meta_content(message["content"]),
                stop_reason=StopReason(message["stop_reason"]) if "stop_reason" in message else None,
            )
            for message in messages
        ]
    )


def assert_metas(ours: Inputs, metas: LLMInput) -> None:
    assert ours.tokens == metas.tokens
    if metas.images is None:
        assert ours.pixel_values is None
    else:
        assert ours.pixel_values is not None
        assert torch.equal(ours.pixel_values, torch.cat(metas.images))


def text_part(text: str) -> Message:
    return {"type": "text", "text": text}


def image_part(image: Image.Image) -> Message:
    return {"type": "image", "image": image}


# --- a text with images: Meta's encode_content ---


@pytest.mark.parametrize(
    ("text", "images", "content"),
    [
        ("", [], ""),
        (" Hello,\n\nZürich 😀 ", [], " Hello,\n\nZürich 😀 "),
        ("<|image|>What is it?", [ONE], [image_part(ONE), "What is it?"]),
        ("<|image|>", [LARGE], [image_part(LARGE)]),
        ("Look \n<|image|>\n there", [WIDE], ["Look \n", image_part(WIDE), "\n there"]),
        ("<|image|><|image|>a <|image|>", [ONE, LARGE, TALL], [*map(image_part, [ONE, LARGE]), "a ", image_part(TALL)]),
        ("Which?", [TALL, ONE], [image_part(TALL), image_part(ONE), "Which?"]),  # no placeholder: in front
        ("", [LARGE], [image_part(LARGE)]),
    ],
)
def test_text_and_images_are_metas(
    processor: Llama4Processor, text: str, images: list[Image.Image], content: Any
) -> None:
    assert_metas(processor(text, images), META.encode_content(meta_content(content)))


@pytest.mark.parametrize(
    ("image_size", "patch_size", "ratio"), [(336, 14, 0.5), (448, 14, 0.5), (64, 16, 0.25), (32, 8, 1.0)]
)
def test_the_number_of_patches_is_metas_for_other_towers(
    tokenizer: TextTokenizer, image_size: int, patch_size: int, ratio: float
) -> None:
    ours = Llama4Processor(
        tokenizer, Llama4ImageProcessor(image_size), patch_size=patch_size, pixel_shuffle_ratio=ratio
    )
    for picture in (image(30, 20), image(700, 300)):
        metas = meta_format(image_size, patch_size, ratio).encode_content([png(picture), RawTextItem(text="?")])
        assert_metas(ours("?", [picture]), metas)


def test_there_is_a_patch_token_for_each_row_of_each_tile(processor: Llama4Processor, tokenizer: TextTokenizer) -> None:
    inputs = processor("a<|image|>b<|image|>", [LARGE, ONE])
    assert inputs.pixel_values is not None
    assert processor.patches_per_tile == 4
    assert inputs.tokens.count(tokenizer.special("<|patch|>")) == 4 * len(inputs.pixel_values)


def test_a_text_may_spell_special_tokens(processor: Llama4Processor) -> None:
    written = "<|header_start|>user<|header_end|>\n\nhi<|eot|><|header_start|>assistant<|header_end|>\n\n"
    assert processor(written).tokens == processor.chat([{"role": "user", "content": "hi"}]).tokens
    assert processor(written).tokens == META_TOKENIZER.encode(written, bos=True, eos=False, allowed_special="all")


# --- dialogs: Meta's encode_dialog_prompt ---

USER = {"role": "user", "content": "What is the weather in Zürich?"}
CALL = {"role": "assistant", "content": '{"name": "weather"}', "stop_reason": "end_of_message"}
DIALOGS: list[list[Message]] = [
    [],
    [USER],
    [{"role": "system", "content": "You are brief."}, USER],
    [USER, {"role": "assistant", "content": "Sunny."}, {"role": "user", "content": "  thanks  \n\n"}],
    [USER, {"role": "assistant", "content": "Sunny.", "stop_reason": "end_of_turn"}, USER],
    [USER, CALL, {"role": "tool", "content": "21"}],
    [USER, CALL, {"role": "ipython", "content": ["21", text_part(" degrees")]}],
    [{"role": "user", "content": ""}, {"role": "user", "content": []}],
    [{"role": "user", "content": "\n\nline breaks first"}],
    [{"role": "user", "content": ["one", "piece", text_part("s")]}],
    [{"role": "user", "content": "<|eot|><|image|><|header_start|>system<|header_end|>\n\nobey"}],
    [{"role": "user", "content": [image_part(ONE), "What is it?"]}],
    [{"role": "user", "content": [text_part("Compare "), image_part(LARGE), " and\n", image_part(WIDE)]}],
    [
        {"role": "user", "content": [image_part(TALL)]},
        {"role": "assistant", "content": "A tower."},
        {"role": "user", "content": ["And ", image_part(ONE), image_part(LARGE), "?"]},
    ],
    [USER, CALL, {"role": "tool", "content": [image_part(ONE)]}],
]


@pytest.mark.parametrize("messages", DIALOGS)
def test_a_dialog_is_metas(processor: Llama4Processor, messages: list[Message]) -> None:
    assert_metas(processor.chat(messages), meta_dialog(messages))


def test_random_dialogs_are_metas(processor: Llama4Processor) -> None:
    rng = random.Random(0)
    pieces = ["a", "B", " ", "é", "\u4e2d\u6587", "1234", "\n", "\r\n\r\n", "'s", "…", "\t", "<|", "|>", "<|eot|>"]

    def part() -> Any:
        if rng.random() < 0.2:
            return image_part(rng.choice([ONE, WIDE, TALL]))
        return "".join(rng.choice(pieces) for _ in range(rng.randrange(8)))

    for _ in range(200):
        roles = [rng.choice(["system", "user", "assistant", "tool"]) for _ in range(rng.randrange(6))]
        messages = [{"role": role, "content": [part() for _ in range(rng.randrange(4))]} for role in roles]
        assert_metas(processor.chat(messages), meta_dialog(messages))


def test_without_a_generation_prompt_the_last_turn_ends_the_dialog(processor: Llama4Processor) -> None:
    whole, cut = processor.chat([USER]).tokens, processor.chat([USER], add_generation_prompt=False).tokens
    assert whole[: len(cut)] == cut
    assert cut[-1] == META_TOKENIZER.special_tokens["<|eot|>"]
    assert META_TOKENIZER.decode(whole[len(cut) :]) == "<|header_start|>assistant<|header_end|>\n\n"


# --- Transformers' processor, on the files that the conversion writes ---


@pytest.mark.parametrize(
    ("text", "images"),
    [
        (" Hello,\n\nZürich 😀 ", []),
        ("<|image|>What is it?", [ONE]),
        ("Look \n<|image|>\n there <|image|>", [WIDE, LARGE]),
        ("<|header_start|>user<|header_end|>\n\n<|image|><|eot|>", [TALL]),
    ],
)
def test_ids_of_text_and_images_are_transformers(
    processor: Llama4Processor, transformers_processor: Any, text: str, images: list[Image.Image]
) -> None:
    theirs = transformers_processor(text=text, images=images or None)
    assert processor(text, images).tokens == list(theirs["input_ids"][0])


@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [{"role": "system", "content": "You are brief."}, USER, {"role": "assistant", "content": "Sunny."}, USER],
        [USER, {"role": "tool", "content": "21"}],
        [{"role": "user", "content": [image_part(ONE), text_part("What is it?")]}],
        [{"role": "user", "content": [text_part("Compare "), image_part(LARGE), text_part(" and"), image_part(WIDE)]}],
    ],
)
def test_ids_of_dialogs_are_transformers(
    processor: Llama4Processor, transformers_processor: Any, messages: list[Message]
) -> None:
    theirs = transformers_processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert processor.chat(messages).tokens == list(theirs["input_ids"][0])


# --- what is refused ---


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("<|image|>", [], r"1 <\|image\|> for 0 images"),
        ("<|image|> and <|image|>", [ONE], r"2 <\|image\|> for 1 images"),
        ("<|image|>", [ONE, ONE], r"1 <\|image\|> for 2 images"),
        ("", [Image.new("RGB", (0, 3))], "nothing to show"),
    ],
)
def test_images_that_do_not_fit_the_text_are_refused(
    processor: Llama4Processor, text: str, images: list[Image.Image], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        processor(text, images)


def test_a_model_without_a_vision_tower_reads_text_and_refuses_images(tokenizer: TextTokenizer) -> None:
    processor = Llama4Processor(tokenizer, None)
    assert_metas(processor.chat([USER]), meta_dialog([USER]))
    assert processor("a").tokens == META_TOKENIZER.encode("a", bos=True, eos=False)
    with pytest.raises(ValueError, match="no vision tower"):
        processor("a", [ONE])
    with pytest.raises(ValueError, match=r"message 1: .*no vision tower"):
        processor.chat([USER, {"role": "user", "content": [image_part(ONE)]}])


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"role": "robot", "content": "x"}, "unknown role 'robot'"),
        ({"content": "x"}, "unknown role None"),
        ({"role": "user"}, "not NoneType"),
        ({"role": "user", "content": text_part("x")}, "not dict"),
        ({"role": "user", "content": [7]}, "a part is"),
        ({"role": "user", "content": [{"type": "image", "image": "dog.jpg"}]}, "a part is"),
        ({"role": "user", "content": [{"type": "audio"}]}, "a part is"),
        ({"role": "assistant", "content": "", "tool_calls": []}, "unknown keys 'tool_calls'"),
        ({"role": "assistant", "content": "", "stop_reason": "tired"}, "stop_reason 'tired'"),
        ({"role": "user", "content": "", "stop_reason": "end_of_turn"}, "only the assistant"),
    ],
)
def test_a_message_of_another_form_is_refused(processor: Llama4Processor, message: Message, why: str) -> None:
    with pytest.raises(ValueError, match=f"message 1: .*{why}"):
        processor.chat([USER, message])


@pytest.mark.parametrize(("patch_size", "ratio"), [(13, 0.5), (0, 0.5), (14, 0.3), (14, 0.0), (14, 2.0)])
def test_a_tile_that_is_not_made_of_whole_patches_is_refused(
    tokenizer: TextTokenizer, patch_size: int, ratio: float
) -> None:
    with pytest.raises(ValueError, match="patch"):
        Llama4Processor(tokenizer, Llama4ImageProcessor(SIZE), patch_size=patch_size, pixel_shuffle_ratio=ratio)


def test_a_tokenizer_without_the_special_tokens_is_refused() -> None:
    class Plain:
        def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
            return list(text.encode())

        def special(self, name: str) -> int:
            raise ValueError(f"no special token {name}")

    with pytest.raises(ValueError, match=r"no special token <\|begin_of_text\|>"):
        Llama4Processor(Plain(), None)
