import itertools

import numpy as np
import pytest
import torch
from scipy.fft import dct, idct
from test_fast import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList

from hf_vla_actions import ActionVocabulary, FASTActionTokenizer, FASTDecodeError, FASTLogitsProcessor
from hf_vla_actions.errors import ConstraintError, InfeasibleConstraintError

BASE, END, PROMPT = 40, 2, 3
SHAPES = ((1, 1), (2, 3), (8, 7), (16, 13))


def smooth(n, horizon, dof, seed=0):
    """Chunks like those of a robot: random walks within [-1, 1]."""
    rng = np.random.default_rng(seed)
    return (rng.uniform(-0.6, 0.6, (n, 1, dof)) + np.cumsum(rng.normal(0, 0.1, (n, horizon, dof)), 1)).clip(-1, 1)


def foreign(min_token=-354, missing=(), n_merges=200, horizon=16, dof=13):
    """A byte-level tokenizer with merges across the borders of characters, some of them very long."""
    rng = np.random.default_rng(1)
    chunks = np.rint(dct(smooth(50, horizon, dof), axis=1, norm="ortho") * 10).astype(int)
    texts = ["".join(chr(c - min_token) for c in chunk.reshape(-1)).encode() for chunk in chunks]
    merges, known = [], {bytes([b]) for b in range(256) if b not in missing}
    while len(merges) < n_merges:
        text = texts[rng.integers(len(texts))]
        start = rng.integers(len(text) - 2)
        longest = [piece for k in range(1, 100) if (piece := text[start : start + k]) in known]
        if not longest:
            continue
        first = longest[-1]
        after = [p for k in range(1, 100) if (p := text[start + len(first) : start + len(first) + k]) in known]
        if after and first + after[-1] not in known:
            merges.append((first, after[-1]))
            known.add(first + after[-1])
    zero = chr(-min_token).encode()
    for _ in range(8):  # runs of up to 256 zeros, longer than many a chunk
        if (zero, zero) in merges or (len(zero) > 1 and zero not in known):
            break
        if zero + zero not in known:
            merges.append((zero, zero))
            known.add(zero + zero)
        zero += zero
    return byte_tokenizer(merges=merges, missing=missing, min_token=min_token)


TOKENIZERS = {
    "bytes": byte_tokenizer,
    "foreign": foreign,
    "three bytes": lambda: foreign(min_token=-3000),
    "across lengths": lambda: foreign(min_token=-2050),  # characters of two bytes and of three
    "one byte": lambda: foreign(min_token=-60),
    "fitted": lambda: FASTActionTokenizer.fit(smooth(300, 16, 13), 512),
}


@pytest.fixture(scope="module")
def tokenizers():
    return {name: make() for name, make in TOKENIZERS.items()}


def processor(tokenizer, horizon, dof, prompt_length=PROMPT, **options):
    ids = np.arange(BASE, BASE + tokenizer.n_codes)
    return FASTLogitsProcessor(tokenizer, (ids, END), horizon, dof, prompt_length, **options)


def generate(fast, rows=16, seed=0, temperature=3.0):
    """Codes of each row, sampled from random scores until all rows have ended."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((rows, PROMPT), 5)
    done = torch.zeros(rows, dtype=torch.bool)
    while not done.all():
        scores = torch.randn(rows, BASE + fast.tokenizer.n_codes + 7, generator=generator) * temperature
        chosen = torch.multinomial(fast(ids, scores).softmax(-1), 1, generator=generator)
        chosen[done] = 0
        ids = torch.cat([ids, chosen], 1)
        done |= chosen[:, 0] == END
        assert ids.shape[1] < 3000
    return [np.array(row[: row.index(END)]) - BASE for row in ids[:, PROMPT:].tolist()]


def allowed(fast, *rows):
    """Which codes are allowed after some, and whether the end is: for rows of the same length."""
    ids = torch.cat([torch.full((len(rows), PROMPT), 5), torch.tensor(np.array(rows, dtype=int)) + BASE], 1)
    codes, done = fast.allowed(ids)
    return codes.numpy(), done.numpy()


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_random_scores_always_spell_a_chunk(tokenizers, name, shape):
    tokenizer = tokenizers[name]
    codes = generate(processor(tokenizer, *shape))
    assert tokenizer.decode(codes, *shape).shape == (16, *shape)
    assert len({tuple(row.tolist()) for row in codes}) > 1


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_encoding_is_refused_and_only_its_end_may_end(tokenizers, name, shape):
    tokenizer = tokenizers[name]
    fast = processor(tokenizer, *shape)
    chunks = np.concatenate(
        [smooth(4, *shape, seed=7), np.ones((1, *shape)), -np.ones((1, *shape)), np.zeros((1, *shape))]
    )
    for codes in tokenizer.encode(chunks):
        for n in range(len(codes) + 1):
            may, done = allowed(fast, codes[:n])
            assert done[0] == (n == len(codes))
            assert may[0].any() != done[0]
            assert done[0] or may[0, codes[n]]


@pytest.mark.parametrize("min_token", [-354, -2050, -3000])
@pytest.mark.parametrize("budget", [None, 5, 7])
def test_exactly_the_tokens_that_can_lead_to_an_end_are_allowed(min_token, budget):
    pieces = [b"".join(chr(c - min_token).encode() for c in (0, 1))]
    whole = [chr(c - min_token).encode() for c in (-2, 0, 1)]
    used = sorted({byte for raw in whole for byte in raw})
    merges = [(raw[:k], raw[k : k + 1]) for raw in whole for k in range(1, len(raw))]
    merges += [(whole[1], whole[2]), (whole[2], whole[1][:1])]
    unique = list(dict.fromkeys(merges))
    tokenizer = byte_tokenizer(merges=unique, missing=set(range(256)) - set(used), min_token=min_token)
    assert pieces[0] in tokenizer.tokens.of
    n, longest = 3, 3 * len(whole[0])
    limit = longest if budget is None else budget - 1

    def spells(codes):
        try:
            tokenizer.decode([np.array(codes, dtype=int)], 1, n)
        except FASTDecodeError:
            return False
        return True

    characters = [chr(c - min_token).encode() for c in range(-tokenizer.limit(1), tokenizer.limit(1) + 1)]
    texts = {raw[:k] for raw in map(b"".join, itertools.product(characters, repeat=n)) for k in range(len(raw) + 1)}
    complete, beginnings = set(), {(): b""}
    for _ in range(limit):
        longer = {
            (*codes, code): raw + tokenizer.tokens.of[code]
            for codes, raw in beginnings.items()
            for code in range(tokenizer.n_codes)
        }
        beginnings = {codes: raw for codes, raw in longer.items() if raw in texts}
        complete |= {codes for codes in beginnings if spells(codes)}
    prefixes = {codes[:k] for codes in complete for k in range(len(codes) + 1)}
    fast = processor(tokenizer, 1, n, max_new_tokens=budget)
    assert len(complete) > 10
    for _, group in itertools.groupby(sorted(prefixes, key=len), key=len):
        rows = list(group)
        may, done = allowed(fast, *rows)
        assert done.tolist() == [codes in complete for codes in rows]
        wanted = [[(*codes, code) in prefixes for code in range(tokenizer.n_codes)] for codes in rows]
        assert np.array_equal(may, wanted)


def test_rows_stand_at_different_places_and_do_not_see_each_other(tokenizers):
    tokenizer = tokenizers["foreign"]
    fast = processor(tokenizer, 8, 7)
    codes = tokenizer.encode(smooth(12, 8, 7))
    n = min(map(len, codes)) - 1
    together, _ = allowed(fast, *(row[:n] for row in codes))
    assert len(np.unique(together, axis=0)) > 3
    for row, may in zip(codes, together, strict=True):
        assert np.array_equal(allowed(fast, row[:n])[0][0], may)


def test_without_a_prompt_length_the_run_of_action_tokens_counts(tokenizers):
    tokenizer = tokenizers["foreign"]
    fast, free = processor(tokenizer, 8, 7, max_new_tokens=60), processor(tokenizer, 8, 7, None, max_new_tokens=60)
    for codes in tokenizer.encode(smooth(3, 8, 7)):
        for n in (0, 1, 2, len(codes) - 1, len(codes)):
            a, b = allowed(fast, codes[:n]), allowed(free, codes[:n])
            assert np.array_equal(a[0], b[0])
            assert np.array_equal(a[1], b[1])
    with pytest.raises(ConstraintError, match="pass prompt_length=4"):
        free.check_prompt(torch.tensor([[1, 1, 1, BASE]]))
    with pytest.raises(ConstraintError, match="prompt has 4 tokens"):
        fast.check_prompt(torch.tensor([[1, 1, 1, 1]]))
    free.check_prompt(torch.tensor([[BASE, 1, 1, 1]]))


def test_after_the_end_only_the_end_may_come(tokenizers):
    fast = processor(tokenizers["bytes"], 1, 1)
    ids = torch.tensor([[5, 5, 5, BASE + 0xC5, BASE + 0xA2, END, 0]])
    scores = fast(ids, torch.zeros(1, BASE + 256))
    assert torch.isfinite(scores).nonzero().tolist() == [[0, END]]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("spare", [0, 1, 5])
def test_the_budget_is_kept_to_the_token(tokenizers, name, spare):
    tokenizer = tokenizers[name]
    with pytest.raises(ConstraintError, match=r"takes at least \d+ tokens") as caught:
        processor(tokenizer, 8, 7, max_new_tokens=1)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    budget = least + 1 + spare
    codes = generate(processor(tokenizer, 8, 7, max_new_tokens=budget))
    tokenizer.decode(codes, 8, 7)
    assert max(map(len, codes)) <= budget - 1
    assert spare or {len(row) for row in codes} == {least}
    with pytest.raises(ConstraintError):
        processor(tokenizer, 8, 7, max_new_tokens=least)


def test_broken_models_and_foreign_beginnings_raise(tokenizers):
    fast = processor(tokenizers["bytes"], 1, 1)
    for value in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(ConstraintError, match="no FAST token is left"):
            fast(torch.full((1, PROMPT), 5), torch.full((1, BASE + 256), value))
    with pytest.raises(ConstraintError, match="no beginning of a chunk"):
        fast(torch.full((1, PROMPT + 2), BASE + 0xC5), torch.zeros(1, BASE + 256))
    guess = processor(tokenizers["bytes"], 1, 1, speculative=True)
    assert torch.isfinite(guess(torch.full((1, PROMPT + 2), BASE + 0xC5), torch.zeros(1, BASE + 256))).any()
    with pytest.raises(ConstraintError, match="goes up to id 295"):
        fast(torch.full((1, PROMPT), 5), torch.zeros(1, BASE + 255))
    with pytest.raises(ConstraintError, match="there are 2 ids"):
        fast(torch.full((1, 2), 5), torch.zeros(1, BASE + 256))
    with pytest.raises(ConstraintError, match="continuous batching"):
        _ = fast.supports_continuous_batching


@pytest.mark.parametrize(
    "wrong",
    [
        {"vocabulary": (np.arange(10, 265), 2)},
        {"vocabulary": (np.arange(256), 2)},
        {"vocabulary": (np.zeros(256, int) + 9, 2)},
        {"horizon": 0},
        {"dof": 1.5},
        {"max_new_tokens": 0},
        {"prompt_length": -1},
        {"horizon": 100, "dof": 1000},
        {"dc_ranges": [[0, 1]]},
        {"dc_ranges": [[0, 1], [1, 0]]},
        {"dc_ranges": [[0.5, 1], [1, 2]]},
        {"lower": np.zeros((3, 2))},
        {"lower": np.nan},
    ],
)
def test_arguments_that_do_not_fit_raise(wrong):
    arguments = {"vocabulary": (np.arange(10, 266), 2), "horizon": 2, "dof": 2} | wrong
    with pytest.raises(ConstraintError):
        FASTLogitsProcessor(byte_tokenizer(), **arguments)


def test_scores_are_kept_as_they_are_wherever_allowed_and_never_written_to(tokenizers):
    tokenizer = tokenizers["fitted"]
    scattered = np.random.default_rng(0).permutation(900)[: tokenizer.n_codes] + 10
    for ids in (np.arange(10, 10 + tokenizer.n_codes), scattered):
        fast = FASTLogitsProcessor(tokenizer, (ids, END), 2, 3)
        scores = torch.randn(2, 1000, dtype=torch.bfloat16)
        before = scores.clone()
        out = fast(torch.full((2, 4), 5), scores)
        assert torch.equal(scores, before)
        assert out.dtype == torch.bfloat16
        kept = torch.isfinite(out)
        assert torch.equal(out[kept], scores[kept])
        may, _ = fast.allowed(torch.full((2, 4), 5))
        assert np.array_equal(np.flatnonzero(kept[0]), np.sort(ids[may[0].numpy()]))


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=700,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=END,
        pad_token_id=0,
        bos_token_id=1,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    return model


@pytest.mark.parametrize("prompt_length", [5, None])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 0},
        {"do_sample": True, "top_p": 0.7, "temperature": 2.0},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 5},
    ],
)
def test_generate_ends_by_itself_with_a_chunk(tokenizers, llama, options, prompt_length):
    tokenizer = tokenizers["foreign"]
    fast = processor(tokenizer, 4, 3, prompt_length, max_new_tokens=20)
    ids = torch.tensor([[0, 0, 1, 9, 8], [1, 9, 7, 6, 5]])
    torch.manual_seed(0)
    out = llama.generate(
        input_ids=ids,
        attention_mask=(ids > 0).long(),
        logits_processor=LogitsProcessorList([fast]),
        max_new_tokens=20,
        **options,
    )
    rows = [row[: row.index(END)] for row in out[:, 5:].tolist()]
    assert len(rows) == 2 * options.get("num_return_sequences", 1)
    tokenizer.decode([np.array(row) - BASE for row in rows], 4, 3)


def test_an_action_vocabulary_says_which_ids():
    from tiny import tiny_tokenizer

    tokenizer, text = byte_tokenizer(), tiny_tokenizer()
    vocabulary = ActionVocabulary.append(text, tokenizer.n_codes)
    fast = FASTLogitsProcessor(tokenizer, vocabulary, 1, 1)
    scores = fast(torch.tensor([[1]]), torch.zeros(1, len(text)))
    assert set(torch.isfinite(scores)[0].nonzero()[:, 0].tolist()) <= set(vocabulary.token_ids.tolist())


@pytest.mark.parametrize("name", TOKENIZERS)
def test_sums_over_the_chunk_are_exact(tokenizers, name):
    tokenizer = tokenizers[name]
    ranges = np.array([[[3, 3], [-5, -2], [0, 0]], [[-28, 28], [7, 8], [-9, -9]]])
    fast = processor(tokenizer, 8, 3, dc_ranges=ranges)
    chunks = tokenizer.decode(generate(fast, rows=40), 8, 3)
    sums = chunks.sum(axis=1) * tokenizer.scale / np.sqrt(8)
    assert np.abs(sums - np.rint(sums)).max() < 1e-9
    for sample in (0, 1):
        found = np.rint(sums[20 * sample : 20 * sample + 20])
        assert (found >= ranges[sample, :, 0]).all()
        assert (found <= ranges[sample, :, 1]).all()
    assert len(np.unique(sums[:20, 1].round())) > 1
    for codes in tokenizer.encode(chunks[:3]):
        may = [allowed(processor(tokenizer, 8, 3, dc_ranges=ranges[0]), codes[:n])[0][0] for n in range(len(codes))]
        assert all(step[code] for step, code in zip(may, codes, strict=True))


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("kind", ["interval", "tight", "away from 0", "per step", "with sums", "budget"])
def test_limits_hold_for_every_value(tokenizers, name, kind):
    tokenizer, rng = tokenizers[name], np.random.default_rng(0)
    lower, upper, options = -np.ones((8, 3)), np.ones((8, 3)), {}
    if kind == "tight":
        lower, upper = lower * 0.05, upper * 0.06
    if kind == "away from 0":
        lower[:, 1], upper[:, 2] = 0.3, -0.2
    if kind == "per step":
        lower, upper = -rng.uniform(0.1, 1, (2, 8, 3)), rng.uniform(0.1, 1, (2, 8, 3))
    if kind == "with sums":
        options, lower[:, 0], upper[:, 0] = {"dc_ranges": [[5, 9], [0, 3], [-20, -20]]}, -0.1, 0.5
    if kind == "budget":
        lower[:, 1] = 0.3
        options = {"max_new_tokens": 8 * 3 * 3 + 3}
    fast = processor(tokenizer, 8, 3, lower=lower, upper=upper, **options)
    codes = generate(fast, rows=24)
    chunks = tokenizer.decode(codes, 8, 3)
    rows = chunks.reshape(2, 12, 8, 3)
    low, high = (x[:, None] if x.ndim == 3 else x for x in (lower, upper))
    assert (rows >= low).all()
    assert (rows <= high).all()
    if kind != "tight":
        assert np.ptp(chunks, axis=0).max() > 0.2
    if kind == "with sums":
        found = np.rint(chunks.sum(1) * tokenizer.scale / np.sqrt(8))
        assert (found[:, 2] == -20).all()
        assert ((found[:, :2] >= [5, 0]) & (found[:, :2] <= [9, 3])).all()


@pytest.mark.parametrize("name", ["foreign", "across lengths", "fitted"])
def test_within_limits_exactly_the_certified_tokens_are_allowed(tokenizers, name):
    tokenizer = tokenizers[name]
    horizon, dof, low, high = 4, 2, np.array([-0.401, 0.151]), np.array([0.701, 0.601])
    fast, free = processor(tokenizer, horizon, dof, lower=low, upper=high), processor(tokenizer, horizon, dof)
    backup, a = fast.box.backup[0], fast.automaton
    assert backup[0] == 0
    assert 3 <= backup[1] <= 12
    checked = 0
    for codes in generate(fast, rows=6):
        for n in range(len(codes)):
            may, valid = allowed(fast, codes[:n])[0][0], allowed(free, codes[:n])[0][0]
            assert not (may & ~valid).any()
            for code in np.flatnonzero(valid):
                raw = b"".join(tokenizer.tokens.of[c] for c in [*codes[:n], code])
                text = raw.decode("utf-8", "ignore")
                pending = raw[len(text.encode()) :]
                chunk = [*(ord(c) + tokenizer.min_token for c in text)]
                if pending:
                    aims = [*backup, *[0] * (horizon * dof)]
                    begins = [c for c, spelled in a.spelled.items() if spelled.startswith(pending)]
                    chunk.append(min(begins, key=lambda c: abs(c - aims[len(chunk)])))
                chunk += [*backup, *[0] * (horizon * dof)][len(chunk) : horizon * dof]
                values = idct(np.reshape(chunk, (horizon, dof)) / tokenizer.scale, axis=0, norm="ortho")
                assert may[code] == ((values >= low) & (values <= high)).all()
                checked += 1
    assert checked > 500


def test_limits_that_no_constant_keeps_raise():
    with pytest.raises(InfeasibleConstraintError, match="dimension 1") as caught:
        processor(byte_tokenizer(), 8, 2, lower=[-1, 0.01], upper=[1, 0.03])
    assert caught.value.bin_width == pytest.approx(0.1 / np.sqrt(8))
    with pytest.raises(InfeasibleConstraintError):
        processor(byte_tokenizer(), 8, 1, dc_ranges=[[10, 12]], upper=0.1)


def test_universal_tokenizer_and_the_reference_s_own_fits(shared):
    if not (shared / "data/fast_plus").is_dir():
        pytest.skip("no FAST+ files")
    universal = FASTActionTokenizer.from_pretrained(shared / "data/fast_plus")
    for tokenizer, shape in [
        (universal, (8, 7)),
        (universal, (50, 13)),
        (universal, (1, 2)),
        *(
            (FASTActionTokenizer.from_pretrained(shared / f"golden/fast/tokenizers/{name}_v1024"), shape)
            for name, shape in (("gr1_50", (50, 13)), ("bridge8", (8, 7)), ("synth8", (3, 2)))
        ),
    ]:
        fast = processor(tokenizer, *shape)
        codes = generate(fast, rows=64)
        tokenizer.decode(codes, *shape)
    ids = np.load(shared / "golden/fast/gr1_50.npz")
    fast = processor(universal, 50, 13)
    for a, b in itertools.pairwise(ids["universal_offsets"][:8]):
        codes = ids["universal_ids"][a:b]
        for n in range(len(codes) + 1):
            may, done = allowed(fast, codes[:n])
            assert done[0] == (n == len(codes))
            assert done[0] or may[0, codes[n]]
