"""Similarity and clusters on tiny sources, against plain computations on all vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from lit_vlm.data.curation.clusters import Clusters, assign, find_centres, first_of_each
from lit_vlm.data.curation.dual_encoder import DualEncoder
from lit_vlm.data.curation.embeddings import PictureEmbeddings, unit
from lit_vlm.data.curation.measuring import measured
from lit_vlm.data.curation.same_pictures import EmbeddingDuplicates
from lit_vlm.data.curation.similarity import Similarity, top_of
from lit_vlm.data.curation.step import Step, Verdict
from lit_vlm.data.curation.table import Table
from lit_vlm.data.sets.engine import Local
from tests.data.curation.dual import save_clip
from tests.data.curation.pairs import Pairs, field


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> DualEncoder:
    return DualEncoder(save_clip(tmp_path_factory.mktemp("dual") / "model"))


WORDS = ("red", "blue", "circle", "square", "a", "the")


def caption(seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, 4).tolist())


ONE = Pairs("one", [(f"r{99 - i}", [field(i)], caption(i)) for i in range(40)])
TWO = Pairs(
    "two",
    [
        *((f"r{i}", [field(100 + i)], caption(i)) for i in range(8)),
        ("several", [field(1), field(2)], caption(3)),
        ("text only", [], "words"),
        ("no text", [field(3)], " "),
    ],
)


@pytest.fixture(scope="module")
def table(encoder: DualEncoder, tmp_path_factory: pytest.TempPathFactory) -> Table:
    step = Similarity(encoder, threshold=0.0)
    return measured([ONE, TWO], step.measures(), tmp_path_factory.mktemp("measures"), Local(1))


def decided(step: Step, table: Table, candidates: NDArray[np.int64] | None = None, seed: int = 0) -> Verdict:
    found = np.arange(len(table)) if candidates is None else candidates
    return step.decide(table, found, np.random.default_rng(seed), None)


def cosines(encoder: DualEncoder, source: Pairs) -> list[float]:
    """Computed one by one, without the stored vectors; NaN without a picture or a text."""
    found = []
    for _, pictures, text in source._rows:
        each = [_cosine(encoder, content, text) for content in pictures if text.strip()]
        found.append(float(np.mean(each)) if each else np.nan)
    return found


def _cosine(encoder: DualEncoder, content: bytes, text: str) -> float:
    import io

    from PIL import Image as PILImage

    seen = encoder.embed(encoder.picture_inputs([PILImage.open(io.BytesIO(content)).convert("RGB")]))
    return float((seen * encoder.embed(encoder.text_inputs([text]))).sum())


def test_similarity_is_the_mean_cosine_of_pictures_and_text(encoder: DualEncoder, table: Table) -> None:
    wanted = np.array(cosines(encoder, ONE) + cosines(encoder, TWO))
    threshold = float(np.nanmedian(wanted))
    verdict = decided(Similarity(encoder, threshold=threshold), table)
    np.testing.assert_allclose(verdict.values, wanted, atol=1e-3)
    clear = np.abs(wanted - threshold) > 2e-3
    np.testing.assert_array_equal(verdict.codes[clear], (wanted < threshold)[clear])
    assert verdict.codes[-2:].tolist() == [0, 2]  # nothing to compare stays; a picture without a text does not
    assert verdict.reasons == ("low_similarity", "no_text")
    some = np.array([3, 11, 48, 49, 50])
    np.testing.assert_array_equal(
        decided(Similarity(encoder, threshold=threshold), table, some).codes, verdict.codes[some]
    )


@pytest.mark.parametrize("top", [1, 5, 9, 40])
def test_the_top_of_each_source_is_that_of_a_sort(encoder: DualEncoder, table: Table, top: int) -> None:
    verdict = decided(Similarity(encoder, top=top), table)
    for number, source in enumerate((ONE, TWO)):
        own = np.flatnonzero((table.source == number) & ~np.isnan(verdict.values))
        names = table.ids(own)
        order = sorted(range(len(own)), key=lambda i, o=own, n=names: (-verdict.values[o[i]], n[i]))
        kept = sorted(int(own[i]) for i in order[:top])
        assert [i for i in own.tolist() if verdict.codes[i] == 0] == kept
        assert len(kept) == min(top, len(own), len(source))


def test_ties_are_broken_by_name_whatever_the_order() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 6, 200) / 10
    names = [f"n{i:03d}" for i in rng.permutation(200)]
    for count in (1, 7, 60, 199, 200, 300):
        kept = {names[i] for i in top_of(values, count, lambda tied: [names[i] for i in tied])}
        wanted = sorted(range(200), key=lambda i: (-values[i], names[i]))[:count]
        assert kept == {names[i] for i in wanted}
        order = rng.permutation(200)
        mixed = [names[i] for i in order]
        assert {mixed[i] for i in top_of(values[order], count, lambda tied, m=mixed: [m[i] for i in tied])} == kept


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda encoder: Similarity(encoder), "either threshold or top"),
        (lambda encoder: Similarity(encoder, 0.2, 5), "either threshold or top"),
        (lambda encoder: Similarity(encoder, top=0), "top is 0"),
        (lambda encoder: Similarity(encoder, threshold=28), "threshold is 28"),
        (lambda encoder: Clusters(encoder, 4), "either nearest or quota"),
        (lambda encoder: Clusters(encoder, 0, 3), "clusters is 0"),
        (lambda encoder: Clusters(encoder, 4, quota=-1), "quota is -1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(encoder: DualEncoder, make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(encoder)  # type: ignore[operator]


def blobs(count: int, centres: int, width: int = 24, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    middle = rng.normal(size=(centres, width))
    return unit(middle[rng.integers(centres, size=count)] + 0.1 * rng.normal(size=(count, width)))


def test_centres_are_the_same_for_the_same_seed_and_any_number_of_threads() -> None:
    import faiss

    vectors, threads = blobs(4000, 12), faiss.omp_get_max_threads()
    one = find_centres(vectors, 12, 10, seed=3)
    np.testing.assert_array_equal(one, find_centres(vectors, 12, 10, seed=3))
    try:
        faiss.omp_set_num_threads(2)
        np.testing.assert_array_equal(one, find_centres(vectors, 12, 10, seed=3))
    finally:
        faiss.omp_set_num_threads(threads)
    assert not np.array_equal(one, find_centres(vectors, 12, 10, seed=4))
    np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1, atol=1e-5)
    assert assign(vectors, one)[1].mean() > assign(vectors, vectors[:12])[1].mean() + 0.02
    more = find_centres(vectors, 60, 10, seed=3)  # enough for each of the twelve blobs to have one
    assert np.quantile(assign(vectors, more)[1], 0.01) > 0.95


def test_vectors_are_assigned_to_the_nearest_centre(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_vlm.data.curation.clusters.CHUNK", 37)
    vectors, centres = blobs(500, 9), blobs(20, 20, seed=1)
    which, found = assign(vectors, centres)
    all_of_them = vectors @ centres.T
    np.testing.assert_array_equal(which, all_of_them.argmax(1))
    np.testing.assert_allclose(found, all_of_them.max(1), atol=1e-5)


def test_the_first_of_each_cluster_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    which, order = rng.integers(0, 30, 400), rng.integers(0, 5, 400).astype(np.float64)
    chosen = first_of_each(which, order, 4)
    for cluster in range(30):
        own = sorted(np.flatnonzero(which == cluster).tolist(), key=lambda row: (order[row], row))
        assert np.flatnonzero(chosen & (which == cluster)).tolist() == sorted(own[:4])
    assert first_of_each(which[:0], order[:0], 4).tolist() == []


def test_the_nearest_of_each_cluster_stay(encoder: DualEncoder, table: Table) -> None:
    verdict = decided(Clusters(encoder, clusters=5, nearest=3), table, seed=1)
    np.testing.assert_array_equal(verdict.codes, decided(Clusters(encoder, 5, 3), table, seed=1).codes)
    rows = table.offsets[:-1][np.diff(table.offsets) > 0]
    vectors = unit(table.column(PictureEmbeddings(encoder), "vector")[rows])
    rng = np.random.default_rng(1)
    sample = np.sort(rng.choice(rows, len(rows), replace=False))
    assert sample.tolist() == rows.tolist()
    centres = find_centres(vectors, 5, 20, int(rng.integers(1 << 31)))
    found = vectors @ centres.T
    records = np.flatnonzero(np.diff(table.offsets) > 0)
    for cluster in range(5):
        own = np.flatnonzero(found.argmax(1) == cluster)
        wanted = own[np.argsort(-found[own, cluster], kind="stable")][:3]
        assert sorted(records[wanted].tolist()) == records[own][verdict.codes[records[own]] == 0].tolist()
    assert verdict.codes[-2] == 0  # it has no picture
    assert np.isnan(verdict.values[-2])


def test_a_quota_bounds_each_cluster_and_draws_by_the_seed(encoder: DualEncoder, table: Table) -> None:
    verdicts = [decided(Clusters(encoder, clusters=4, quota=2), table, seed=seed) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(verdicts[0].codes, verdicts[1].codes)
    assert not np.array_equal(verdicts[0].codes, verdicts[2].codes)
    assert 4 < (verdicts[0].codes == 0).sum() <= 4 * 2 + 1
    assert verdicts[0].reasons == ("over_quota",)


def test_more_clusters_than_pictures_are_refused(encoder: DualEncoder, table: Table) -> None:
    with pytest.raises(ValueError, match="clusters is 60, and the steps before left 50 records with pictures"):
        decided(Clusters(encoder, clusters=60, nearest=1), table)


def test_any_number_of_readers_gives_the_same_vectors(encoder: DualEncoder, table: Table, tmp_path: Path) -> None:
    sources: Sequence[Pairs] = (ONE, TWO)
    alone = measured(sources, Similarity(encoder, top=1).measures(), tmp_path)
    for measure in Similarity(encoder, top=1).measures():
        np.testing.assert_array_equal(alone.column(measure, "vector"), table.column(measure, "vector"))


def test_vectors_are_computed_once_for_all_curations(
    encoder: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measured([ONE], Similarity(encoder, top=1).measures(), tmp_path)
    wanted = first.column(PictureEmbeddings(encoder), "vector")

    def refuse(self: DualEncoder, pictures: object) -> None:
        raise AssertionError("pictures are prepared again")

    monkeypatch.setattr(DualEncoder, "picture_inputs", refuse)
    other = DualEncoder(encoder._name, batch_size=7)
    again = measured([ONE], Clusters(other, 4, nearest=1).measures(), tmp_path)
    np.testing.assert_array_equal(again.column(PictureEmbeddings(other), "vector"), wanted)
    with pytest.raises(AssertionError, match="prepared again"):
        measured([TWO], Clusters(other, 4, nearest=1).measures(), tmp_path)


def test_no_model_is_loaded_to_decide_on_what_was_measured(
    table: Table, encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("lit_vlm.data.curation.dual_encoder._loaded", refuse)
    again = DualEncoder(str(encoder._folder))
    steps = [
        Similarity(again, top=5),
        Clusters(again, clusters=2, nearest=3),
        EmbeddingDuplicates(again, threshold=0.9),
    ]
    kept = [int((decided(step, table).codes == 0).sum()) for step in steps]
    assert all(0 < count < len(table) for count in kept)
