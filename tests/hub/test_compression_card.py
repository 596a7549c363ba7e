"""The card of a compressed network says what it was given, says nothing else, and its snippet runs."""

from dataclasses import replace

from huggingface_hub import ModelCard

from hf_simprune.hub.card_check import check_card, missing_parts
from hf_simprune.hub.compression_card import CompressionCard, render_compression_card
from hf_simprune.hub.eval_results import Evaluated
from hf_simprune.hub.facts import Licence
from hf_simprune.rba.block_map import block_map
from hf_simprune.rba.plan import CompressionPlan, Span


PLAN = CompressionPlan(12, (Span(5, 6), Span(10, 11)))
BARE = CompressionCard(
    name="small-vit",
    model_id="me/small-vit",
    model_class="ViTForImageClassification",
    auto_class="AutoModelForImageClassification",
    result="label",
    output="model.config.id2label[model(**inputs).logits.argmax(-1).item()]",
    stock=True,
    original="my-vit",
    depth=12,
    kept=10,
    chosen="chosen by its measured effect on the outputs",
    fitted="in closed form, untrained",
    block_map=block_map(PLAN),
    replaced=[("block 5", "fold, into the MLP of block 4"), ("block 10", "fold, into the MLP of block 9")],
    dataset="flowers",
    calibration="300 images",
    evaluated_on="150 images held out from calibration",
    results=[
        ("parameters, M", "5.7", "4.8", "-15.6 %", ""),
        ("KL of the logits, nats", "0", "0.2", "[0.1, 0.3]", "150 images"),
    ],
    limits=["Measured on 150 images."],
    command="hf-simprune compress my-vit --dataset flowers --remove-blocks 2 --output small-vit",
    seed=42,
    hardware="a laptop",
    versions={"torch": "A", "transformers": "B"},
)
FULL = replace(
    BARE,
    stock=False,
    original="someone/vit",
    base_model="someone/vit",
    dataset_id="someone/flowers",
    licence=Licence("apache-2.0"),
    healed=[("KL of the logits, nats", "0", "0.15", "[0.1, 0.2]", "150 images")],
    heal_steps=200,
    notes=["This network has little to give."],
    protocol=["Calibration: 200 images to fit.", "Brackets are 95 % intervals."],
    eval_results=[
        Evaluated(dataset="flowers", split="train").accuracy("top-1, original head", 0.705, 139, "as it was"),
        Evaluated(dataset="flowers", split="train").accuracy("top-1, re-trained head", 0.8, 150, "fitted anew"),
    ],
    settings={"ridge": 1e-4, "token": "secret"},
    picture="redundancy.png",
)


def test_metadata_is_what_the_hub_reads():
    data = ModelCard(render_compression_card(FULL)).data
    assert (data.library_name, data.license, data.base_model) == ("transformers", "apache-2.0", "someone/vit")
    assert (data.datasets, data.pipeline_tag) == (["someone/flowers"], "image-classification")
    assert data.base_model_relation == "finetune"
    assert [(r.metric_value, r.metric_args["num_samples"]) for r in data.eval_results] == [(0.705, 139), (0.8, 150)]
    backbone = ModelCard(render_compression_card(replace(FULL, auto_class="AutoModel"))).data
    assert backbone.pipeline_tag == "image-feature-extraction"


def test_the_text_holds_what_was_given():
    text = render_compression_card(FULL)
    assert "[someone/vit](https://huggingface.co/someone/vit) with 10 of its 12 blocks" in text
    assert "| block 5 | fold, into the MLP of block 4 |" in text
    assert "| parameters, M | 5.7 | 4.8 | -15.6 % |  |" in text
    assert "| KL of the logits, nats | 0 | 0.2 | [0.1, 0.3] | 150 images |" in text
    assert block_map(PLAN) in text and "- Brackets are 95 % intervals.\n" in text
    assert "## Limits\n\n- Measured on 150 images.\n\n## Reproduce" in text
    assert "After 200 steps of label-free distillation" in text and "| 0.15 |" in text
    assert "> This network has little to give." in text
    assert "](redundancy.png)" in text and FULL.command in text and "torch A, transformers B" in text
    assert "trust_remote_code=True" in text and "stock class" not in text


def test_what_was_not_given_is_not_mentioned():
    text = render_compression_card(BARE)
    for word in ("distillation", "trust_remote_code", "None", "<details>", "redundancy.png)", "> "):
        assert word not in text.split("## Citation")[0], word
    assert text.split("# small-vit")[1].strip().startswith("my-vit with 10 of its 12 blocks, a `ViT")
    data = ModelCard(text).data
    assert data.license == "unknown" and data.datasets is None and data.base_model is None


def test_cards_are_sound_whatever_they_tell():
    for card in (BARE, FULL, replace(FULL, healed=()), replace(BARE, notes=["a", "b"], picture="redundancy.png")):
        text = render_compression_card(card)
        assert check_card(text) == [] and missing_parts(text) == []


def test_a_network_made_from_another_one_names_both():
    text = render_compression_card(replace(FULL, original="smaller"))
    assert "smaller, made from [someone/vit](https://huggingface.co/someone/vit), with 10 of its 12 blocks" in text
    assert ModelCard(text).data.base_model == "someone/vit"


def test_a_network_that_keeps_all_blocks_says_that_parts_went():
    assert "with 12 of its 12 blocks, some of them in part" in render_compression_card(replace(BARE, kept=12))


def test_access_tokens_never_reach_the_card():
    secret = "hf_" + "a1B2" * 9
    text = render_compression_card(replace(FULL, command=f"hf-simprune compress hf_models/m {secret} --token short"))
    assert secret not in text and "hf-simprune compress hf_models/m *** --token ***\n" in text


def test_markdown_has_no_holes():
    for card in (BARE, FULL):
        text = render_compression_card(card)
        assert "{{" not in text and "{%" not in text and "\n\n\n" not in text
        assert text.endswith("```\n") and all(line == line.rstrip() for line in text.splitlines())
