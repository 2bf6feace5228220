"""What adapters would cost: against PEFT's count, a real pool, and what can be counted by hand; and the command."""

import dataclasses
import json

import huggingface_hub
import pytest
import torch
import transformers
from models import HIDDEN, INNER, LAYERS, VOCAB, base_model, lora_config
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from typer.testing import CliRunner

import peft_kernels
from peft_kernels import cli
from peft_kernels.integrations import estimate as costs
from peft_kernels.integrations.estimate_bottleneck import estimate_bottleneck
from peft_kernels.ops.batched_lora.pooled_reference import FIRST_PAGE, PAGE

RUN = CliRunner()


@pytest.fixture
def folder(tmp_path):
    """A function that writes a model's config.json, and nothing else, into a folder."""

    def write(name, **changes):
        base_model(name, **changes).config.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return write


def estimated(folder, **question):
    question = costs.Question(**{"adapters": 5, "rank": 4, "dtype": torch.float32} | question)
    return costs.estimate(costs.model_on_meta(folder), question)


@pytest.mark.parametrize("targets", ["all-linear", "some"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_trainable_parameters_are_those_that_peft_counts(name, targets, folder):
    some = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn",), "bert": ("query",), "t5": ("wi", "o")}
    targets = some[name] if targets == "some" else targets
    real = base_model(name)
    parameters = sum(p.numel() for p in real.parameters())
    adapted = get_peft_model(real, lora_config(r=6, target_modules=targets if targets == "all-linear" else [*targets]))
    found = estimated(folder(name), rank=6, target_modules=targets)
    assert found.adapter_parameters == adapted.get_nb_trainable_parameters()[0]
    assert (found.base_parameters, found.base) == (parameters, 4 * parameters)
    assert found.adapter_parameters == sum(kind.count * 6 * (kind.K + kind.N) for kind in found.sites)
    assert not found.notes


def test_sites_are_grouped_by_what_differs_in_numbers_only(folder):
    kinds = {kind.name: kind for kind in estimated(folder("llama")).sites}
    assert len(kinds) == 7
    name = "model.layers.*.mlp.down_proj"
    assert kinds[name] == costs.SiteKind(name, LAYERS, INNER, HIDDEN)
    (only,) = estimated(folder("gpt2"), target_modules=("c_attn",)).sites
    assert only == costs.SiteKind("transformer.h.*.attn.c_attn", LAYERS, HIDDEN, 3 * HIDDEN)


@pytest.mark.parametrize("adapters,rank,dtype", [(1, 4, torch.float32), (5, 8, torch.bfloat16), (3, 20, torch.float16)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_memory_is_that_of_a_pool(name, adapters, rank, dtype, folder):
    model = get_peft_model(base_model(name), lora_config(r=rank))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    sites = {n: peft_kernels.Site(m.in_features, m.out_features) for n, m in layers.items()}
    pool = peft_kernels.AdapterPool(sites, adapters, dtype)
    for i in range(adapters):
        factors = {n: (torch.ones(rank, s.K), torch.ones(s.N, rank), 1.0, None) for n, s in sites.items()}
        pool.add(f"a{i}", factors)
    found = estimated(folder(name), adapters=adapters, rank=rank, adapter_dtype=dtype)
    assert in_use(pool, rank) == found.pool <= pool.nbytes <= found.pool_at_most
    more = estimated(folder(name), adapters=adapters + 1, rank=rank, adapter_dtype=dtype)
    assert more.pool - found.pool == found.adapter


def in_use(pool, rank):
    """Bytes of the tables, and of the pages that they name."""
    tables, pages, count = 0, {}, -(-rank // PAGE)
    for name, site in pool.sites.items():
        _, _, table, *others = pool.tables(name)
        tables += table.nbytes + sum(tensor.nbytes for tensor in others)
        a, b = table[table[:, 0] > 0, FIRST_PAGE:].chunk(2, dim=1)
        for width, numbers in ((site.K, a), (site.N, b)):
            pages.setdefault(width, set()).update(numbers[:, :count].flatten().tolist())
    return tables + sum(len(numbers) * PAGE * width * pool.dtype.itemsize for width, numbers in pages.items())


@pytest.mark.parametrize("tied", [False, True])
def test_what_a_step_reads(tied, folder):
    """Each weight once, but of a table that is only looked up, a row per row of the batch."""
    found = estimated(folder("llama", tie_word_embeddings=tied), dtype=torch.bfloat16, adapter_dtype=torch.float32,
                      adapters=9, rows=6)  # fmt: skip
    looked_up = 0 if tied else (VOCAB - 6) * HIDDEN
    assert found.step_base == 2 * (found.base_parameters - looked_up)
    assert found.distinct == 6 and found.step_adapters == 6 * 4 * found.adapter_parameters
    assert found.token_base * 6 == found.step_base and found.token * 6 == found.step_base + found.step_adapters
    assert found.price == (found.step_base + found.step_adapters) / found.step_base
    alone = estimated(folder("llama"), rows=6, distinct=0)
    assert alone.price == 1 and alone.step_adapters == 0


@pytest.mark.parametrize("changes,said", [
    ({"rank": 0}, "rank must be from 1 to 1024, got 0"),
    ({"adapters": 0}, "adapters and rows must be 1 or more, got 0 and 32"),
    ({"rows": 0}, "adapters and rows must be 1 or more, got 5 and 0"),
    ({"distinct": 6}, "distinct must be from 0 to 5, the rows and the adapters, got 6"),
    ({"target_modules": ("q_pro",)}, "'q_pro'.* not found in the base model"),
    ])  # fmt: skip
def test_questions_without_an_answer_are_refused_in_words(changes, said, folder):
    with pytest.raises(ValueError, match=said):
        estimated(folder("llama"), **changes)


def test_ranks_above_those_that_are_trained_fused_are_a_pools(folder):
    model = folder("llama")
    assert not estimated(model, rank=512).notes
    (note,) = estimated(model, rank=1024).notes
    assert "a pool serves rank 1024; training with it is left to PEFT's own forward above 512" in note
    pool = peft_kernels.attach_pool(base_model("llama"), adapters=1)
    assert pool.max_rank == 1024


def test_an_embedding_reads_a_column_of_its_a(folder):
    found = estimated(folder("llama"), target_modules=("embed_tokens", "q_proj"), adapters=5, distinct=5, rank=4)
    assert [kind.name for kind in found.sites] == ["model.embed_tokens", "model.layers.*.self_attn.q_proj"]
    size = torch.float32.itemsize
    assert found.step_adapters == 5 * size * 4 * (1 + HIDDEN + LAYERS * 2 * HIDDEN) and not found.notes


# -- the command ------------------------------------------------------------------------------------------------------


def command(*arguments):
    return RUN.invoke(cli.app, ["estimate", *arguments])


def test_the_command_prints_what_the_estimate_holds(folder):
    model = folder("llama")
    given = (model, "--adapters", "64", "--rank", "4", "--dtype", "fp32", "--target-modules", "q_proj,v_proj")
    printed, as_json = command(*given), command(*given, "--json")
    assert printed.exit_code == as_json.exit_code == 0, printed.output
    found = estimated(model, adapters=64, target_modules=("q_proj", "v_proj"))
    words = json.loads(as_json.output)
    assert words.items() >= json.loads(json.dumps(dataclasses.asdict(found))).items()
    assert (words["model"], words["dtype"], words["adapter_dtype"]) == (model, "float32", "float32")
    for text in ("model.layers.*.self_attn.q_proj", f"{found.adapter_parameters:,}", f"x{found.price:.3f}", "32 rows"):
        assert text in printed.output
    one = command(model, "--adapters", "1", "--rank", "4").output
    assert "with 1 adapter " in one and "1 adapters" not in one


def test_a_model_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name, text in (("broken", "{"), ("wrong", '{"model_type": "llama", "hidden_size": "wide"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    folders = [str(tmp_path / name) for name in ("", "nowhere", "broken", "wrong")]
    for name in (*folders, "someone/a-model-that-is-not-in-the-cache"):
        result = command(name, "--adapters", "1", "--rank", "4")
        assert result.exit_code == 2
        assert result.output.startswith("estimate: MODEL must be a folder with a config.json") and name in result.output


def test_a_dtype_that_is_none(folder):
    result = command(folder("llama"), "--adapters", "1", "--rank", "4", "--adapter-dtype", "int4")
    assert result.exit_code == 2 and "bf16, fp16, fp32" in result.output


@pytest.mark.parametrize(
    "count,words", [(0, "0 B"), (999, "999 B"), (1e3, "1 kB"), (16.06e9, "16.06 GB"), (5e15, "5000 TB")]
)
def test_bytes_in_words(count, words):
    assert cli._bytes(count) == words


# -- bottleneck adapters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", cli.METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_bottleneck_parameters_are_those_that_attach_adds(name, method, folder):
    config = getattr(peft_kernels.BottleneckConfig, method)(r=5)
    real = base_model(name)
    base = sum(p.numel() for p in real.parameters())
    peft_kernels.attach(real, config)
    question = costs.Question(adapters=3, rank=5, dtype=torch.bfloat16, adapter_dtype=torch.float32, rows=2)
    found = estimate_bottleneck(costs.model_on_meta(folder(name)), config, question)
    assert found.adapter_parameters == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert (found.base_parameters, found.base, found.adapter) == (base, 2 * base, 4 * found.adapter_parameters)
    assert (found.adapters, found.distinct, found.step_adapters) == (3 * found.adapter, 2, 2 * found.adapter)
    assert found.share == found.adapter_parameters / base and found.price > 1
    scale = HIDDEN if method == "adapter_plus" else 0
    assert all(b.parameters == b.count * (2 * HIDDEN * 5 + 5 + HIDDEN + scale) for b in found.blocks)


def test_the_budget_of_the_paper():
    """He et al. 2022: scaled parallel adapters with r = 512 in BART large; the rest of MAM's 6.7 % are prefixes."""
    with torch.device("meta"):
        large = transformers.BartForConditionalGeneration(transformers.BartConfig())
    config = peft_kernels.BottleneckConfig.scaled_parallel(r=512)
    found = estimate_bottleneck(large, config, costs.Question(adapters=1, rank=512))
    assert found.adapter_parameters == 24 * (2 * 1024 * 512 + 512 + 1024) and 0.06 < found.share < 0.067
    mam = estimate_bottleneck(large, peft_kernels.MAMConfig(), costs.Question(adapters=1, rank=512))
    assert mam.adapter_parameters == found.adapter_parameters + 36 * 2 * 30 * 1024 and f"{mam.share:.1%}" == "6.7%"


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_prefix_parameters_are_those_that_attach_adds(name, folder):
    config = peft_kernels.PrefixTuningConfig(num_virtual_tokens=5, composition="add", gate=True)
    real = base_model(name)
    peft_kernels.attach(real, config)
    found = estimate_bottleneck(costs.model_on_meta(folder(name)), config, costs.Question(adapters=3, rank=5))
    assert found.adapter_parameters == sum(p.numel() for p in real.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", cli.WITH_PREFIX)
def test_the_command_for_prefixes(folder, method):
    given = (folder("llama"), "--adapters", "8", "--rank", "4", "--method", method, "--json")
    words = json.loads(command(*given).output)
    blocks = {block["name"]: (block["bottleneck"], block["parameters"]) for block in words["blocks"]}
    P = {"prefix": 4, "mam": 30}[method]
    assert blocks.pop("model.layers.*.self_attn") == (P, LAYERS * 2 * P * 2 * HIDDEN // 4)
    assert blocks == ({"model.layers.*.mlp": (4, LAYERS * (2 * HIDDEN * 4 + 4 + HIDDEN))} if method == "mam" else {})


def test_the_command_for_bottleneck_adapters(folder):
    given = (folder("llama"), "--adapters", "8", "--rank", "4", "--method", "scaled_parallel")
    printed, as_json = command(*given), command(*given, "--json")
    assert printed.exit_code == as_json.exit_code == 0, printed.output
    words = json.loads(as_json.output)
    assert words["method"] == "scaled_parallel"
    assert words["adapter_parameters"] == LAYERS * (2 * HIDDEN * 4 + 4 + HIDDEN)
    for text in ("model.layers.*.mlp", f"{words['adapter_parameters']:,}", f"{words['share']:.3%}", "8 adapters"):
        assert text in printed.output
    wrong = command(*given[:-1], "compacter")
    assert wrong.exit_code == 2 and "scaled_parallel" in wrong.output
