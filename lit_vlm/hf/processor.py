"""The processor of an exported model: chats, text and pictures become what the model reads, as in its training."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from lit_vlm.core.part import meta_parameters
from lit_vlm.data import ImageTransform
from lit_vlm.data.records import RecordError
from lit_vlm.data.sample.chat_template import IMAGE_MARK
from lit_vlm.data.sample.pieces import IMAGE_SLOT, encode_pieces
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.hf.config import AUTO_MAP, factories
from lit_vlm.hf.pictures import by_text, opened, stacked
from lit_vlm.hf.typed import pieces_of, typed
from lit_vlm.model.build import Slots
from lit_vlm.projectors.base import InTurn

Padding = bool | Literal["longest", "max_length", "do_not_pad"]


class LitVLMProcessor(ProcessorMixin):
    """Text, chats and pictures → `input_ids`, `attention_mask`, `pixel_values`, `image_sizes`.

    A picture stands where the text has `<image>`, and takes as many positions as it has visual tokens. Letters of a
    special token in a chat's messages stay letters, as in training.

    Args:
        tokenizer: the decoder's fast tokenizer, with the token for images.
        slots: the slots of the model, as in its configuration; they say how many tokens a picture has.
        hidden_size: width of the decoder.
        vocab_size: rows of the decoder's word table.
        transform: `class_path` and `init_args` of how pictures are resized.
        max_length: most positions of a sample in training; longer ones give a warning.
        typed_marks: see `data.Template`; for chats.
        own_start: see `data.Template`; for chats.
        chat_template: how chats are written.
    """

    def __init__(
        self,
        tokenizer: Any,
        slots: dict[str, dict[str, Any]],
        hidden_size: int,
        vocab_size: int,
        transform: dict[str, Any],
        max_length: int,
        typed_marks: Literal["text", "tokens"] = "text",
        chat_template: str | None = None,
        own_start: bool = False,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        self.slots, self.hidden_size, self.vocab_size = slots, hidden_size, vocab_size
        self.transform, self.max_length, self.typed_marks = transform, max_length, typed_marks
        self.own_start = own_start
        self.image_token = IMAGE_MARK
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_MARK)
        self.auto_map = AUTO_MAP

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoProcessor") -> None:
        """Do nothing: `auto_map` names the stub, so no file of the kit is copied when a processor is saved."""

    def to_json_string(self) -> str:
        """The settings as JSON. transformers sorts keys, but the order of task tokens has a meaning."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Write tokenizer, settings and chat template, and the stub that imports the kit."""
        from lit_vlm.hf.backbone import write_stub

        saved = super().save_pretrained(save_directory, *args, **kwargs)
        write_stub(Path(save_directory))
        return saved

    # ------------------------------------------------------------------ what the model wants

    @cached_property
    def spec(self) -> InputSpec:
        """What the data side knows of the model; the parts that count tokens are built without weights."""
        slots: Slots = factories(self.slots)
        with torch.device("cpu"), meta_parameters():
            encoder = slots.encoder()
            projector = slots.projector(encoder.width, self.hidden_size)
            embedder = slots.embedder(self.hidden_size, self.vocab_size)
        grid_map = InTurn(projector.grid_map, embedder.grid_map)
        return InputSpec(self.tokenizer, encoder.pixels, encoder.patch_grid, grid_map)

    @cached_property
    def _resize(self) -> ImageTransform:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--transform", type=ImageTransform)
        made = parser.instantiate_classes(parser.parse_object({"transform": self.transform})).transform
        assert isinstance(made, ImageTransform)
        return made

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a call returns."""
        return ["input_ids", "attention_mask", "pixel_values", "image_sizes"]

    # ------------------------------------------------------------------ calls

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        padding: Padding = True,
        padding_side: Literal["left", "right"] = "left",
        max_length: int | None = None,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
        truncation: bool | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare texts with the pictures of their `<image>` marks.

        Args:
            images: pictures of all texts in order, or a list of them for each text: PIL pictures, arrays `[h, w, 3]`,
                paths, URLs.
            text: one text, or several.
            padding: `longest` (or True) pads to the longest text, `max_length` to `max_length`.
            padding_side: `left`, as generation needs it; the model's loss is the same with either.
            max_length: length to pad to.
            add_special_tokens: whether a text that lacks it gets the token that stands in front of every text.
            return_tensors: `pt` or None; pictures are tensors in any case.
            truncation: refused where it would cut, as a picture can only be there whole.
            kwargs: nested `text_kwargs` and `images_kwargs`, as transformers passes them; videos and sound, if empty.

        Raises:
            ValueError: for a text without its picture, a picture without its mark, a picture that cannot be read, text
                that would be cut, videos or sound, or an argument that this processor does not have.
        """
        given = {**kwargs.pop("common_kwargs", {}), **kwargs.pop("text_kwargs", {}), **kwargs.pop("images_kwargs", {})}
        if given:
            return self(images, text, **{"return_tensors": return_tensors, "padding": padding} | given | kwargs)
        _check_others(kwargs)
        if text is None:
            raise ValueError("give text: a picture is asked about, with <image> where it stands")
        texts = [text] if isinstance(text, str) else list(text)
        _check_call(texts, padding, padding_side, return_tensors)
        pixels = [[self._pixels(image) for image in row] for row in by_text(images, texts)]
        rows = [self._ids(one, own, add_special_tokens) for one, own in zip(texts, pixels, strict=True)]
        if empty := [index for index, row in enumerate(rows) if not row]:
            raise ValueError(f"text {empty[0]} is empty, and nothing can follow it")
        longest = max(len(row) for row in rows)
        if longest > self.max_length:
            warnings.warn(f"{longest} positions; the model was trained on {self.max_length} at most", stacklevel=2)
        if truncation and max_length is not None and longest > max_length:
            raise ValueError(f"{longest} positions do not fit max_length {max_length}, and pictures cannot be cut")
        width = max_length or longest if padding == "max_length" else longest
        width = 0 if padding in (False, "do_not_pad") else width
        padded = [_padded(row, width, padding_side, self._pad_id) for row in rows]
        data: dict[str, Any] = {
            "input_ids": [ids for ids, _ in padded],
            "attention_mask": [mask for _, mask in padded],
        }
        if return_tensors is not None:
            if width == 0 and len({len(row) for row in rows}) > 1:
                raise ValueError("texts of several lengths make no tensor without padding: leave padding at True")
            data = {name: torch.tensor(value) for name, value in data.items()}
        if any(pixels):
            data["pixel_values"], data["image_sizes"] = stacked(pixels)
        return BatchFeature(data)

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """As transformers' processors do; with `tokenize=True`, letters of special tokens in messages stay letters.

        Args:
            conversation: messages, or a list of conversations.
            chat_template: default: the model's own.
            kwargs: as for `ProcessorMixin.apply_chat_template`.

        Raises:
            ValueError: with `return_assistant_tokens_mask`, which the kit's templates do not mark.
        """
        if kwargs.get("return_assistant_tokens_mask"):
            raise ValueError("return_assistant_tokens_mask: the chat template of this model marks no answers")
        if kwargs.get("tokenize") and self.typed_marks == "text":
            conversation = typed(conversation)
        if kwargs.get("tokenize") and self.own_start:
            given = kwargs.get("processor_kwargs") or {}
            kwargs["processor_kwargs"] = {"add_special_tokens": False, **given}
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    @property
    def _pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def _ids(self, text: str, pixels: Sequence[Tensor], add_special_tokens: bool) -> list[int]:
        """Ids of a text, with `image_token_id` at each visual token."""
        bos = self.tokenizer.bos_token if self.spec.bos_id is not None else None
        begins = bos is not None and text.startswith(bos)
        if self.own_start and not add_special_tokens:  # a chat, whose template has written all that it begins with
            return self._with_images(encode_pieces(pieces_of(text), self.spec, bos=False)[0], pixels)
        pieces = pieces_of(text.removeprefix(bos) if begins and bos else text)
        encoded, _ = encode_pieces(pieces, self.spec)
        if bos is not None and not begins and not add_special_tokens:
            encoded = encoded[1:]
        return self._with_images(encoded, pixels)

    def _with_images(self, encoded: Sequence[int], pixels: Sequence[Tensor]) -> list[int]:
        grids = iter([self.spec.grid(*image.shape[1:]) for image in pixels])
        ids: list[int] = []
        for token in encoded:
            ids += [self.image_token_id] * next(grids).num_tokens if token == IMAGE_SLOT else [token]
        return ids

    def _pixels(self, image: Any) -> Tensor:
        """uint8 `[3, h, w]` of a picture, resized as in training."""
        try:
            return self._resize(opened(image), self.spec.pixels)
        except RecordError as error:
            raise ValueError(f"a picture cannot be used: {error}") from error


OTHER_MEDIA = ("videos", "audio", "audios")
"""Arguments that general code passes to every processor, mostly empty."""
IGNORED = frozenset({"return_mm_token_type_ids", "return_token_type_ids", "return_attention_mask"})
"""Arguments that transformers passes to every processor, and that mean nothing to this one."""


def _check_others(arguments: Mapping[str, Any]) -> None:
    """Refuse what the processor has no argument for, unless it says nothing; raises ValueError."""
    if shown := sorted(name for name in OTHER_MEDIA if arguments.get(name)):
        raise ValueError(f"{', '.join(shown)}: this model is shown pictures alone")
    if unknown := {key for key, value in arguments.items() if value is not None} - IGNORED - {*OTHER_MEDIA}:
        raise ValueError(f"LitVLMProcessor has no argument {', '.join(sorted(unknown))}")


def _check_call(texts: Sequence[Any], padding: Any, padding_side: Any, return_tensors: Any) -> None:
    """Refuse values that would otherwise be read as others."""
    allowed: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("padding", padding, (True, False, "longest", "max_length", "do_not_pad")),
        ("padding_side", padding_side, ("left", "right")),
        ("return_tensors", return_tensors, (None, "pt")),
    ]
    for name, value, known in allowed:
        if value not in known:
            raise ValueError(f"{name} is {value!r}; LitVLMProcessor takes {', '.join(map(repr, known))}")
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"text must be a text or a list of texts, found {texts!r}"[:200])


def _padded(ids: list[int], width: int, side: str, pad_id: int) -> tuple[list[int], list[int]]:
    """Ids and mask of a row of at least this width."""
    missing = max(0, width - len(ids))
    padding, ones = [pad_id] * missing, [1] * len(ids)
    if side == "left":
        return padding + ids, [0] * missing + ones
    return ids + padding, ones + [0] * missing
