"""docs/questions.md: each experiment runs again, gives the numbers of docs/questions.json, and breaks what it breaks.

Two things hold of every table. Each number is that of the JSON, within the noise of its column (NOISE): another
processor rounds differently, and a training amplifies that. Base weights that are off by 1e-6 move a gain by 0.06 dB at
most; question 3 is the exception (ELSEWHERE). And the right way beats the broken one by a margin below the measured
effect and above the noise. The margins stand in the tests of the ten questions; none comes from the JSON.
"""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))  # a program, not a package
import experiments  # noqa: E402

NUMBERS = json.loads(experiments.NUMBERS.read_text(encoding="utf-8"))
PAGE = experiments.PAGE.read_text(encoding="utf-8")
NOISE = {"gain": (0.5, 0.05), "text": (0.1, 0)}  # of gains and textures: absolute and relative
OTHER_NOISE = (0.01, 0.25)  # of losses and errors
# On an AMD EPYC without AVX-512 question 3 has other numbers: one training starts from the result of another.
ELSEWHERE = {
    "3": {
        "teacher, two passes": (8.384, 7.426, -0.727),
        "distilled, one pass": (8.486, 6.251, -0.027),
        "distilled, then trained on data at g = 1.5": (10.179, 11.896, 5.888),
        "distilled, then trained on data at g = 2.5": (9.176, 9.162, 10.178),
    }
}


@pytest.fixture(scope="module")
def table(request):
    """The table of a question, made once, side by side with the others that tests of this call ask for."""
    asked = " ".join(item.name for item in request.session.items)
    numbers = [n for n in experiments.QUESTIONS if f"_{n}_" in asked or f"[{n}]" in asked]
    made = experiments.run_side_by_side(numbers)
    yield lambda number: made[number].result()
    for future in made.values():
        future.cancel()


def column(table, name):
    return {row: cells[name] for row, cells in table.items() if name in cells}


@pytest.mark.parametrize("number", experiments.QUESTIONS)
def test_the_numbers_are_those_of_the_page(table, number):
    expected, found = NUMBERS[str(number)], table(number)
    assert found.keys() == expected.keys() and all(found[row].keys() == expected[row].keys() for row in expected)
    known, misses = [expected], []
    if other := ELSEWHERE.get(str(number)):
        known.append({row: dict(zip(expected[row], values, strict=True)) for row, values in other.items()})
    for numbers in known:  # all of them are those of one processor
        misses.append([])
        for row, cells in found.items():
            for name, value in cells.items():
                kind = "gain" if row.startswith("gain") else name[:4]
                absolute, relative = NOISE.get(kind, OTHER_NOISE)
                if value != pytest.approx(numbers[row][name], abs=absolute, rel=relative):
                    misses[-1].append(f"{row}: {name}: {value}, expected {numbers[row][name]}")
    assert [] in misses, misses


def test_the_page_shows_the_numbers():
    assert experiments.page(PAGE, NUMBERS) == PAGE, "stale: python docs/experiments.py"


def test_an_unknown_question_is_one_line(capsys):
    assert experiments.main(["11"]) == 2
    assert capsys.readouterr().out == "experiments.py: got 11, expected numbers from 1 to 10, or none for all.\n"


# ------------------------------------------------------------------- the right way is better, by these margins at least


def test_1_one_flip_breaks_and_all_flips_agree(table):
    gains = column(table(1), "gain")
    right, agrees = gains.pop("as in flow.py"), gains.pop("all three: dx/dt = flux, t from 1 to 0")
    assert right > 2
    assert agrees == pytest.approx(right, abs=0.01)
    assert all(gain < 0 for gain in gains.values()), gains


def test_2_shifted_sampling_and_training_are_better(table):
    gains = {row: cells["gain, 12 steps"] for row, cells in table(2).items()}
    for density in ("shift", "uniform"):
        assert gains[f"trained {density}, sampled shifted"] > gains[f"trained {density}, sampled plain"] + 0.2, gains
    for name in ("shifted", "plain"):
        assert gains[f"trained shift, sampled {name}"] > gains[f"trained uniform, sampled {name}"], gains


def test_3_a_lora_works_at_its_guidance(table):
    distilled, low, high = (
        [table(3)[row][f"gain at g = {g}"] for g in (1.0, 1.5, 2.5)]
        for row in ("distilled, one pass", *(f"distilled, then trained on data at g = {g}" for g in (1.5, 2.5)))
    )
    assert distilled[0] > distilled[2] + 4, distilled  # the embedding is a dial
    assert low[1] > low[2] + 2, low
    assert high[2] > high[1] + 0.4, high


def test_4_a_mask_changes_the_velocity(table):
    changes, gains = column(table(4), "change of the velocity"), column(table(4), "gain")
    right = "as trained: padded, no mask"
    assert changes.pop(right) == 0
    base = [row for row in changes if "LoRA" not in row]
    assert all(changes[row] > 0.005 for row in base), changes
    assert max(gains[row] for row in base) < gains[right] + 0.3
    padded, short = (
        "LoRA trained on the padded prompt, sampled with",
        "LoRA trained on the first 8 tokens, sampled with",
    )
    assert changes.pop(f"{padded} padded") == changes.pop(f"{short} 8 tokens") == 0
    assert min(changes[f"{padded} 8 tokens"], changes[f"{short} padded"]) > changes["padding masked in Flux"] + 0.03
    for lora in (padded, short):  # by less than two trainings differ
        assert abs(gains[f"{lora} padded"] - gains[f"{lora} 8 tokens"]) < 1.5


def test_5_the_floor_the_ends_and_one_loss_for_two_pictures(table):
    for name in ("bridge, noise", "kontext, noise"):
        losses = column(table(5), name)
        none, start, end = (losses[row] for row in ("predicting no change", "at sigma 0.0", "at sigma 0.95"))
        assert none > 1.5 * start > 0, name
        assert end > 1.5 * start, name
        assert 0 < losses["deviation of a batch of 4"] < none
    assert table(5)["predicting no change"]["kontext, noise"] > 1  # the variance of the noise
    mean, first, gain = (table(5)[row] for row in ("mean of the five", "at sigma 0.0", "gain of one step"))
    source, clean = (f"bridge of the {part}, fading" for part in ("source half", "clean half"))
    assert mean[source] == pytest.approx(mean[clean], rel=0.05)
    assert first[source] < first[clean]
    assert gain[source] > gain[clean] + 1


def test_6_random_times_and_the_dial_of_steps(table):
    random, start = (column(table(6), f"gain, trained at {times}") for times in ("random times", "sigma = 0"))
    one, eight = "euler, evaluations: 1", "euler, evaluations: 8"
    assert start[one] > random[one] - 0.5
    assert start[one] - start[eight] > random[one] - random[eight] + 0.5
    assert random[eight] < random[one] - 0.1
    texture = column(table(6), "texture, trained at random times")
    assert 1.5 * texture[one] < texture[eight] < 1.3
    for n in (2, 4):
        assert texture[f"midpoint, evaluations: {n}"] > texture[f"euler, evaluations: {n}"]


def test_7_what_is_fixed_and_what_is_a_choice(table):
    base, lora = column(table(7), "gain of the base on noise"), column(table(7), "gain of a LoRA on fading")
    right, another = "nothing broken", "nothing broken, another seed"
    assert base.pop(right) > 2
    assert len(base) == 2
    assert max(base.values()) < 0, base
    assert abs(lora[another] - lora[right]) < lora[right] - lora["guessed: --start-time auto"], "more than chance"
    assert lora["guessed: --sigma logit-normal"] > lora[right] - 3
    assert lora["guessed: --start-time auto"] < min(lora[right], lora[another]) - 2


def test_8_a_lora_does_nothing_for_these_reasons(table):
    gains, sizes = column(table(8), "gain"), column(table(8), "correction / weight")
    right, slow = "trained, strength 1", "trained with alpha = rank / 16"
    best, size, other = gains.pop(right), sizes[right], sizes["on another base: its single blocks reversed"]
    assert 1 < gains.pop(slow) < best - 2
    assert all(gain < best - 4 for gain in gains.values()), gains
    assert sizes["B at zero, as at the start"] == 0
    assert other == pytest.approx(size, rel=0.1), "a large correction promises nothing"
    small = (
        "trained, strength 0.25",
        "learning rate 0.0001, as many steps",
        "warm-up of 2000 steps, stopped after 80",
    )
    assert all(sizes[row] < size / 2 for row in small), sizes


def test_9_index_1_at_the_same_place_and_the_output_cut(table):
    gains = column(table(9), "gain")
    right = gains.pop("index 1, same rows and columns")
    assert right > 2
    assert gains.pop("index 0, in sampling only") < right - 0.25
    del gains["index 0, in training too"]  # a small difference, which depends on the seed
    assert all(gain < right - 2 for gain in gains.values()), gains


def test_10_precision(table):
    errors = column(table(10), "error of the velocity")
    assert errors.pop("all in float32") == 0
    assert all(0 < error < 0.2 for error in errors.values()), errors
    assert errors["RoPE's cos and sin in bfloat16"] < errors["weights and activations in bfloat16"]
    full, tenth = (column(table(10), f"A loses an update of {u:.0e}") for u in (1e-4, 1e-5))
    for width in (192, 3072):
        assert full[f"LoRA in float32, A as at width {width}"] == tenth[f"LoRA in float32, A as at width {width}"] == 0
        assert table(10)[f"LoRA in bfloat16, A as at width {width}"]["A after 20 steps: unchanged"] > 0.05
    assert full["LoRA in bfloat16, A as at width 192"] > 0.1
    assert full["LoRA in bfloat16, A as at width 3072"] == 0, "half the spacing is at most 6.1e-5 there"
    assert tenth["LoRA in bfloat16, A as at width 3072"] > 0.4
