"""The kit's own members keep the contracts of `lit_vlm.testing`; one without a case fails, and so does a bad one."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from lit_vlm import data, decoders, embedders, encoders, heads, projectors, teachers, worlds
from lit_vlm.commands.recipe import SHIPPED
from lit_vlm.core.batch import Grid, Images, PixelSpec, VisualTokens
from lit_vlm.core.part import Part
from lit_vlm.core.tokenizers import byte_tokenizer
from lit_vlm.data import (
    AnyRes,
    AreaLimit,
    AspectGrid,
    Captions,
    ChatJsonl,
    ChatML,
    Converted,
    FitBox,
    Fuyu,
    Grouped,
    HFChat,
    ImageTransform,
    Llama3,
    LlavaJson,
    LlavaVideo,
    Mmc4,
    Native,
    NativeArea,
    PadSquare,
    Parquet,
    PatchBudget,
    Phi3,
    Pictures,
    Plain,
    RandomWords,
    Resize,
    Source,
    SquareCrop,
    Template,
    Texts,
    Tiles,
    Unpaired,
    Vetted,
    VicunaV1,
    WebDataset,
)  # fmt: skip
from lit_vlm.data.records import Message, Record, RecordError, Text, image_bytes
from lit_vlm.data.records.pictures import image_file
from lit_vlm.data.sample.templates import Span
from lit_vlm.data.sets.convert import convert
from lit_vlm.encoders import HFEncoder, LinearPatches
from lit_vlm.evaluation.tasks import TASKS, LetterNamings, RecordFile, SceneQuestions, SceneText, Scoring
from lit_vlm.heads import FeatureDistillation
from lit_vlm.planning.mock import Mock
from lit_vlm.projectors import Linear, Projector
from lit_vlm.teachers import DINOv2, EncoderTeacher, HFVision, KnownMap, Teacher
from lit_vlm.testing import (
    Case,
    check_adapters,
    check_decoder,
    check_embedder,
    check_encoder,
    check_head,
    check_projector,
    check_sharded,
    check_source,
    check_task,
    check_teacher,
    check_template,
    check_transform,
)  # fmt: skip
from lit_vlm.testing.data import PIXELS
from lit_vlm.worlds import Namings, OpenMoji, Scenes, Shapes
from tests.data.made_videos import make_video, rows_of, turns
from tests.encoders.test_teachers import DINO
from tests.evaluation.tasks.test_files import CASES as TASK_FILES
from tests.evaluation.tasks.test_files import make as make_task
from tests.heads.made import OwnCount
from tests.members import ADAPTED, CASES, SLOT_OF, WITHOUT_LINEAR_LAYERS, Looping, Tangled
from tests.tiny import CLIP

# ------------------------------------------------------------------ members and their cases


def public(package: ModuleType, kind: type) -> set[str]:
    """Names of the classes of a kind that a package exports, without abstract ones."""
    members = {name: getattr(package, name) for name in package.__all__}
    return {
        name
        for name, member in members.items()
        if inspect.isclass(member) and issubclass(member, kind) and not inspect.isabstract(member)
    }


SLOTS = (encoders, projectors, embedders, decoders, heads)
PARTS = {package: public(package, Part) for package in SLOTS}
TEACHERS: dict[str, Callable[[], Teacher]] = {
    "EncoderTeacher": partial(EncoderTeacher, partial(LinearPatches, 16, 7)),
    "DINOv2": partial(DINOv2, None, {"model_type": "dinov2", **DINO}, 4),
    "HFVision": partial(HFVision, None, CLIP),
    "KnownMap": partial(KnownMap, "depth"),
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "Plain": Plain,
    "VicunaV1": VicunaV1,
    "ChatML": ChatML,
    "Llama3": Llama3,
    "Phi3": Phi3,
    "Fuyu": Fuyu,
    "HFChat": lambda: HFChat(CHATML).for_tokenizer(byte_tokenizer()),
}
ANY = PixelSpec(None, 7, (0.5, 0.5, 0.5))
TRANSFORMS: dict[str, Callable[[], ImageTransform]] = {
    "AnyRes": partial(AnyRes, tile=28),
    "AreaLimit": partial(AreaLimit, 64),
    "AspectGrid": partial(AspectGrid, 56, 4),
    "FitBox": partial(FitBox, 64, 50),
    "Native": Native,
    "NativeArea": partial(NativeArea, 400, 4000),
    "PatchBudget": partial(PatchBudget, 30),
    "PadSquare": PadSquare,
    "Resize": Resize,
    "SquareCrop": SquareCrop,
    "Tiles": partial(Tiles, tile=28),
}
TURNS = [{"from": "human", "value": "<image>\nWhy?"}, {"from": "gpt", "value": "So."}]
CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


def written(folder: Path, name: str, content: str) -> str:
    (folder / name).write_text(content)
    return str(folder / name)


def mmc4(folder: Path) -> Source:
    row = {"image_info": [{"image_name": "a.png", "matched_text_index": 0}], "text_list": ["One.", "Two."]}
    return Mmc4(written(folder, "docs.jsonl", json.dumps(row)))


def converted(folder: Path) -> Source:
    if not (folder / "set").exists():
        convert(Shapes(4), folder / "set")
    return Converted(str(folder / "set"))


def parquet(folder: Path) -> Source:
    pq.write_table(pa.table({"messages": [CHAT] * 3}), folder / "a.parquet")
    return Parquet(str(folder / "a.parquet"))


def pictures(folder: Path) -> Source:
    (folder / "a.png").write_bytes(Shapes(1, text_only=False).record(0).images[0].data or b"")
    return Pictures(str(folder))


SOURCES: dict[str, Callable[[Path], Source]] = {
    "Captions": lambda folder: Captions(written(folder, "a.csv", "image,caption\na.png,a cat\nb.png,a dog\n")),
    "ChatJsonl": lambda folder: ChatJsonl(written(folder, "a.jsonl", json.dumps({"messages": CHAT}) + "\nbroken\n")),
    "Converted": converted,
    "Grouped": lambda _: Grouped(Shapes(6), 2),
    "LlavaJson": lambda folder: LlavaJson(
        written(folder, "a.json", json.dumps([{"image": "a.png", "conversations": TURNS}] * 2))
    ),
    "LlavaVideo": lambda folder: LlavaVideo(
        rows_of(folder, [{"video": make_video(folder / "a.mp4").name, "conversations": turns()}] * 2)
    ),
    "Mmc4": mmc4,
    "Mock": lambda _: Mock(str(SHIPPED / "llava15" / "statistics.yaml"), "2_sft", "llava_v1_5_mix665k", records=24),
    "Parquet": parquet,
    "Pictures": pictures,
    "RandomWords": lambda _: RandomWords("bytes", 16, 4),
    "Texts": lambda folder: Texts(written(folder, "a.txt", "one\n\ntwo\n")),
    "Unpaired": lambda folder: Unpaired(
        Shapes(4, text_only=False), ChatJsonl(written(folder, "t.jsonl", json.dumps({"messages": CHAT})))
    ),
    "Vetted": lambda folder: Vetted(Shapes(6), written(folder, "list", "0" * 64), "MIT"),
    "WebDataset": lambda folder: WebDataset(str(tar_of(folder))),
    "Namings": lambda _: Namings("questions", 6),
    "OpenMoji": lambda _: OpenMoji("held_out", 32, limit=4),
    "Scenes": lambda _: Scenes("questions", 6, 3, maps=4),
    "Shapes": lambda _: Shapes(6),
}


def tar_of(folder: Path) -> Path:
    import tarfile

    written(folder, "0.txt", "a cat")
    (folder / "0.png").write_bytes(Shapes(1, text_only=False).record(0).images[0].data or b"")
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name in ("0.txt", "0.png"):
            tar.add(folder / name, name)
    return folder / "a.tar"


OWN_KINDS = [
    *[(package.__name__, members, {name.split("/")[0] for name in CASES}) for package, members in PARTS.items()],
    ("teachers", public(teachers, Teacher), TEACHERS.keys()),
    ("templates", public(data, Template), TEMPLATES.keys()),
    ("transforms", public(data, ImageTransform), TRANSFORMS.keys()),
    ("sources", public(data, Source) | public(worlds, Source), SOURCES.keys()),
    ("tasks", set(TASKS), {*TASK_FILES, "perplexity", "scenes", "scenes_text", "namings", RecordFile.name}),
]


@pytest.mark.parametrize(("kind", "members", "cases"), OWN_KINDS, ids=[kind for kind, *_ in OWN_KINDS])
def test_every_public_member_has_a_case(kind: str, members: set[str], cases: set[str]) -> None:
    assert members - set(cases) == set(), f"give each a line in this file or in tests/members.py ({kind})"


# ------------------------------------------------------------------ the kit's own


def of_slot(package: ModuleType) -> list[str]:
    return [name for name in CASES if name.split("/")[0] in PARTS[package] and name != "AbsentDecoder"]


@pytest.mark.parametrize("name", of_slot(encoders))
def test_encoders(name: str) -> None:
    # Published classes carry them, and no feature passes them.
    unread = (".mask_token", ".swin.layernorm.weight", ".swin.layernorm.bias")
    check_encoder(CASES[name].slots["encoder"], CASES[name].sizes, unread)


@pytest.mark.parametrize("name", of_slot(projectors))
def test_projectors(name: str) -> None:
    own: dict[str, Any] = {
        "Identity": {"out_width": 32},
        "PerEncoder": {"grids": (Grid(4, 4, suffix=2),) * 2},
    }
    check_projector(CASES[name].slots["projector"], **own.get(name, {}))


@pytest.mark.parametrize("name", of_slot(embedders))
def test_embedders(name: str) -> None:
    slots = dict(CASES[name].slots)
    check_embedder(slots.pop("embedder"), slots, CASES[name].sizes)


@pytest.mark.parametrize("name", of_slot(decoders))
def test_decoders(name: str) -> None:
    check_decoder(CASES[name].slots["decoder"])


@pytest.mark.parametrize("name", [*of_slot(heads), "OwnCount"])
def test_heads(name: str) -> None:
    if name == "OwnCount":
        check_head(partial(OwnCount, teacher=partial(HFVision, None, CLIP)))
        return
    slots = dict(CASES[name].slots)
    check_head(slots.pop("heads")["own"], slots, adds_up=name != "EmbeddingDistillation")


@pytest.mark.parametrize("name", SLOT_OF)
def test_adapters(name: str) -> None:
    if name in WITHOUT_LINEAR_LAYERS:
        with pytest.raises(
            ValueError, match=rf"model.lora.{SLOT_OF[name]}: adapters go on linear layers, and .* {name.split('/')[0]}"
        ):
            check_adapters(CASES[name], SLOT_OF[name])
    else:
        check_adapters(CASES[name], SLOT_OF[name])


@pytest.mark.parametrize("name", TEACHERS)
def test_teachers(name: str) -> None:
    check_teacher(TEACHERS[name])


@pytest.mark.parametrize("name", SOURCES)
def test_sources(name: str, tmp_path: Path) -> None:
    check_source(lambda: SOURCES[name](tmp_path))


@pytest.mark.parametrize("name", SOURCES)
def test_sources_take_a_deny_list(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(Shapes(1, text_only=False).record(0).images[0].data or b"")
    source = SOURCES[name](tmp_path)
    hashes = [hashes_of(source, index) for index in range(min(8, len(source)))]
    listed = max((own for own in hashes if own is not None), key=len)  # of a record with pictures, where there is one
    deny = written(tmp_path, "deny", "\n".join(["0" * 64, *listed]))
    check_source(lambda: Vetted(SOURCES[name](tmp_path), written(tmp_path, "other", "0" * 64)))
    vetted = Vetted(source, deny)
    for index, own in enumerate(hashes):
        if own is None:
            assert isinstance(read(vetted, index), str)
        elif own & listed:
            with pytest.raises(RecordError, match="^denied: "):
                vetted.record(index)
        else:
            assert read(vetted, index) == read(source, index)
    assert listed or name in ("ChatJsonl", "Parquet", "RandomWords", "Texts")  # which have no picture here


def hashes_of(source: Source, index: int) -> set[str] | None:
    """SHA-256 of the files of a record's pictures and videos; None where one of these, or it, cannot be read."""
    try:
        images = source.record(index).images
        videos = [image_file(image, source.image_folder).read_bytes() for image in images if image.in_video]
        pictures = [image_bytes(image, source.image_folder) for image in images if not image.in_video]
    except RecordError:
        return None
    return {hashlib.sha256(content).hexdigest() for content in (*videos, *pictures)}


def read(source: Source, index: int) -> Record | str:
    try:
        return source.record(index)
    except RecordError as error:
        return error.reason


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates(name: str) -> None:
    check_template(TEMPLATES[name], turns=1 if name == "Plain" else 2)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str) -> None:
    check_transform(TRANSFORMS[name], (ANY,) if name in ("AreaLimit", "Native") else PIXELS)


@pytest.mark.parametrize("name", [*TASK_FILES, "perplexity"])
def test_tasks(name: str, tmp_path: Path) -> None:
    # A split of POPE without "yes" has no F1, MME adds up points, and of several references the first may not be best.
    percent = TASKS[name].main == "accuracy" and name not in ("vqav2", "okvqa", "textvqa", "vizwiz")
    made = iter(range(9))

    def factory() -> Any:
        folder = tmp_path / str(next(made))
        folder.mkdir()
        return make_task(name, folder)

    check_task(factory, best=100.0 if percent else None)


@pytest.mark.parametrize("task", [SceneQuestions, SceneText, LetterNamings])
def test_tasks_without_files(task: Any) -> None:
    check_task(partial(task, count=2), best=None if task.perplexity else 100.0)


@pytest.mark.parametrize("scoring", get_args(Scoring))
def test_tasks_of_own_files(scoring: Scoring, tmp_path: Path) -> None:
    records = [
        {"messages": [{"role": "user", "content": f"{n}?"}], "answers": [f"{n}"], "options": ["0", "1"], "kind": "sums"}
        for n in range(2)
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    check_task(lambda: RecordFile(str(tmp_path / "mine.jsonl"), scoring))


@pytest.mark.slow
def test_all_parts_train_on_two_processes_one_without_pictures_as_on_one() -> None:
    # In one start of two processes, as a start takes longer than all members.
    # The last case ends them: the process with pictures of two sizes sees it, and its partner does not wait for ever.
    last = {"looping": Case({"encoder": Looping}, [(28, 28), (14, 28)])}
    cases = CASES | ADAPTED
    alike = rf"{len(cases)} cases are alike; looping: encoder Looping: block 0 runs again in one forward pass"
    with pytest.raises(AssertionError, match=alike):
        check_sharded(cases | last)


# ------------------------------------------------------------------ what breaks a rule


def test_a_block_that_runs_twice_is_named() -> None:
    with pytest.raises(AssertionError, match=r"block 0 runs again in one forward pass.*docs/extending.md"):
        check_encoder(Looping)


class WithLambda(Linear):
    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(in_width, out_width)
        self.grid_map = lambda grid: grid


class Wrong(Linear):
    """Says that it halves the rows."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(in_width, out_width)
        self.grid_map = half


def half(grid: Grid) -> Grid:
    return grid._replace(rows=grid.rows // 2)


class Mixing(Linear):
    """Centres all tokens of a batch."""

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        out = super().forward(tokens)
        return VisualTokens(out.features - out.features.mean(0), out.grids)


class Reading(Linear):
    """Reads the weight of its layer, and does not run it."""

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        return VisualTokens(tokens.features @ self.linear.weight.T, tokens.grids)


class Idle(Linear):
    """Has a weight that nothing reads."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(in_width, out_width)
        self.spare = nn.Parameter(torch.zeros(1))


class Cut(Linear):
    """Nothing in front of it learns."""

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        return super().forward(VisualTokens(tokens.features.detach().requires_grad_(), tokens.grids))


class NotInMeta(Projector):
    """Goes around `nn.Parameter` when it is made."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(in_width, out_width)
        self.linear = nn.Linear(in_width, out_width)
        self.linear._parameters["bias"] = nn.Parameter(torch.zeros(out_width))

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        return VisualTokens(self.linear(tokens.features), tokens.grids)


class Named(Template):
    """Leaves the answers without a loss."""

    def _turns(self, system: Any, turns: Any, eos: str) -> Any:
        yield Span("".join(message.text for message in turns))


class Forgetful(Source):
    """Another record each time."""

    name, image_folder = "f", Path()
    reads = 0

    def __len__(self) -> int:
        return 2

    def record(self, index: int) -> Record:
        self.reads += 1
        return Record(str(self.reads), "f", (Message("document", (Text(str(self.reads)),)),))

    def fingerprint(self) -> str:
        return "f"


class Larger(SquareCrop):
    def size(self, size: Any, pixels: PixelSpec) -> Any:
        side, _ = super().size(size, pixels)
        return side * 2, side


class Reversing(EncoderTeacher):
    """Gives the features in another order."""

    def __call__(self, images: Images) -> VisualTokens:
        tokens = super().__call__(images)
        return VisualTokens(tokens.features.flip(0), tokens.grids[::-1])


class Mean(FeatureDistillation):
    """A mean where a sum is wanted."""

    def loss(self, states: Any, batch: Any, targets: VisualTokens) -> Tensor:
        return super().loss(states, batch, targets) / len(batch.image_grids)


class Backwards(SceneQuestions):
    def solve(self, example: Any) -> str:
        return "Z"


class Halved(SceneQuestions):
    def score_of(self, outcome: Any) -> float:
        return super().score_of(outcome) / 2


VIT = partial(HFVision, None, CLIP)
BROKEN: list[tuple[str, Callable[[], None]]] = [
    ("WithLambda: grid_map does not pickle", partial(check_projector, WithLambda)),
    ("Wrong: gives Grid.* where grid_map promises", partial(check_projector, Wrong)),
    ("Mixing: an image of Grid.* is another in company", partial(check_projector, Mixing)),
    ("Idle: spare gets no gradient from images", partial(check_projector, Idle)),
    ("Cut: some visual tokens have no gradient", partial(check_projector, Cut)),
    ("NotInMeta: linear.bias is not on the meta device", partial(check_projector, NotInMeta)),
    ("Tangled: is another after save and load", partial(check_projector, Tangled)),
    ("Reading: linear.lora_A.default.weight gets no gradient. .* effective_weight",
     partial(check_adapters, Case({"projector": Reading}), "projector")),
    ("Linear: is no Encoder", partial(check_encoder, partial(Linear, 8, 8))),  # type: ignore[arg-type]
    ("Named: of .* only '' is supervised", partial(check_template, Named)),
    ("Forgetful: record 1 is not always the same", partial(check_source, Forgetful)),
    ("Larger: makes .* and size.. says", partial(check_transform, Larger)),
    ("Reversing: picture 0 is another in company, or out of order",
     partial(check_teacher, partial(Reversing, partial(HFEncoder, config=CLIP)))),
    ("Mean: the loss of a batch is not the sum over its samples", partial(check_head, partial(Mean, teacher=VIT))),
    ("Backwards: right answers have accuracy 0", partial(check_task, partial(Backwards, count=2))),
    ("Halved: 'accuracy' is 50.0, and the mean of score_of 25", partial(check_task, partial(Halved, count=2))),
]  # fmt: skip


@pytest.mark.parametrize(("message", "check"), BROKEN, ids=[message.split(":")[0] for message, _ in BROKEN])
def test_a_member_that_breaks_a_rule_is_told_which(message: str, check: Callable[[], None]) -> None:
    with pytest.raises(AssertionError, match=f"{message}.*docs/extending.md"):
        check()
