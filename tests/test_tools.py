"""What else people train and run adapted models with: other modalities in the Trainer, pipelines, Lightning, diffusers' offload."""

import functools

import pytest
import torch
from rotation import often
from tiny_models import foreign_code, llama, t5
from transformers import (
    CLIPConfig,
    CLIPModel,
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
    default_data_collator,
    pipeline,
)

from minipeft import LoraConfig, get_lora_model, load_adapter
from minipeft.hf import AdapterTrainer, AdapterTrainerMixin

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DRAWN = torch.Generator().manual_seed(0)


class AdapterSeq2SeqTrainer(AdapterTrainerMixin, Seq2SeqTrainer):
    pass


def images(count=8):
    return torch.randn(count, 3, 16, 16, generator=DRAWN)


def ids(*shape):
    return torch.randint(4, 100, shape, generator=DRAWN)


def vit():
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=3, **SIZES))


def clip():
    text = {"vocab_size": 100, "max_position_embeddings": 16, **SPECIAL, **SIZES}
    vision = {"image_size": 16, "patch_size": 8, **SIZES}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def wav2vec2():
    layers = {"num_feat_extract_layers": 2, "conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 8)}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}
    return Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=100, pad_token_id=0, **layers, **positions, **SIZES))


def whisper():
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 8, "max_source_positions": 20}
    config = WhisperConfig(
        vocab_size=100, max_target_positions=20, decoder_start_token_id=3, **sizes, **HEADS, **SPECIAL
    )
    return WhisperForConditionalGeneration(config)


def with_loss(rows):
    """CLIP computes its loss on demand."""
    return {**default_data_collator(rows), "return_loss": True}


def rows_of(**columns):
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


GENERATION = GenerationConfig(max_length=6, decoder_start_token_id=3, **SPECIAL)
GENERATING = functools.partial(Seq2SeqTrainingArguments, predict_with_generate=True, generation_config=GENERATION)
CASES = {
    "ViT": (vit, rows_of(pixel_values=images(), labels=torch.arange(8) % 3), AdapterTrainer, TrainingArguments,
            {"modules_to_save": ["classifier"]}),
    "CLIP": (clip, rows_of(input_ids=ids(8, 6), pixel_values=images()), AdapterTrainer, TrainingArguments,
             {"target_modules": ["q_proj", "v_proj"]}),
    "wav2vec2": (wav2vec2, rows_of(input_values=torch.randn(8, 800, generator=DRAWN), labels=ids(8, 5)), AdapterTrainer,
                 TrainingArguments, {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}),
    "Whisper": (whisper, rows_of(input_features=torch.randn(8, 8, 40, generator=DRAWN), labels=ids(8, 6)),
                AdapterSeq2SeqTrainer, GENERATING, {"target_modules": ["q_proj", "v_proj"]}),
    "T5": (t5, rows_of(input_ids=ids(8, 6), labels=ids(8, 6)), AdapterSeq2SeqTrainer, GENERATING, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", often(CASES, ["ViT", "T5"]))
def test_it_trains_generates_resumes_exactly_and_is_read_back(case, tmp_path):
    make, rows, trainer, arguments, options = CASES[case]

    def base():
        torch.manual_seed(0)
        return make()

    def run(resume=None):
        model = get_lora_model(base(), LoraConfig(r=4, **{"target_modules": "all-linear", **options}))
        settings = {"max_steps": 4, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1}
        settings |= {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "per_device_train_batch_size": 2}
        quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
        collator = with_loss if case == "CLIP" else default_data_collator
        made = trainer(model, arguments(str(tmp_path), **settings, **quiet), collator, rows, rows[:2])
        made.train(resume_from_checkpoint=resume)
        return model.eval(), [row["loss"] for row in made.state.log_history if "loss" in row]

    model, losses = run()
    again, as_before = run(str(tmp_path / "checkpoint-2"))
    assert losses == as_before
    assert len(set(losses)) == 4
    tensors = again.adapter_state_dict()
    assert all(torch.equal(value, tensors[key]) for key, value in model.adapter_state_dict().items())
    names = {path.name for path in (tmp_path / "checkpoint-4").glob("*.safetensors")}
    assert names == {"adapter_model.safetensors"}
    batch = default_data_collator(rows[:2])
    loaded = load_adapter(base(), tmp_path / "checkpoint-4").eval()
    with torch.no_grad():
        found, expected = loaded(**batch), model(**batch)
    results = [name for name, value in expected.items() if isinstance(value, torch.Tensor)]
    assert results
    assert all(torch.equal(found[name], expected[name]) for name in results)


def test_a_pipeline_takes_an_adapted_model():
    image = pytest.importorskip("PIL.Image").new("RGB", (16, 16))
    model = get_lora_model(vit(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    with foreign_code():
        found = pipeline("image-classification", model=model, image_processor=processor)(image)
    expected = model(**processor(image, return_tensors="pt")).logits.softmax(-1)[0]
    assert {row["label"]: row["score"] for row in found} == pytest.approx(
        {f"LABEL_{place}": float(value) for place, value in enumerate(expected)}
    )


def test_lightning_saves_adapters_alone_and_resumes_exactly(tmp_path):
    lightning = pytest.importorskip("lightning")
    rows = ids(8, 6)

    class Lit(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model, self.strict_loading, self.losses = model, False, []

        def training_step(self, batch):
            loss = self.model(input_ids=batch, labels=batch).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)

        def on_save_checkpoint(self, checkpoint):
            kept = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
            checkpoint["state_dict"] = {name: t for name, t in checkpoint["state_dict"].items() if name in kept}

    def run(folder, resume=None):
        torch.manual_seed(0)
        lit = Lit(get_lora_model(llama(), LoraConfig(r=4, lora_dropout=0.0)).train())
        saves = lightning.pytorch.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        made = lightning.Trainer(max_epochs=2, callbacks=[saves], default_root_dir=folder, **quiet)
        made.fit(lit, torch.utils.data.DataLoader(rows, batch_size=2), ckpt_path=resume)
        return lit

    whole = run(tmp_path / "a")
    checkpoint = tmp_path / "a" / "epoch=0.ckpt"
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert state
    assert all(".adapters." in name for name in state)
    rest = run(tmp_path / "b", checkpoint)
    assert rest.losses == whole.losses[4:]
    whole.model.save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(llama(), tmp_path / "adapter").adapter_state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in rest.model.adapter_state_dict().items())


@pytest.mark.parametrize("adapt_first", [True, False])
def test_diffusers_offloads_an_adapted_part(adapt_first):
    diffusers = pytest.importorskip("diffusers")
    from accelerate import cpu_offload

    def unet():
        torch.manual_seed(0)
        blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
        sizes = {"block_out_channels": (8,), "layers_per_block": 1, "cross_attention_dim": 16, "norm_num_groups": 2}
        return diffusers.UNet2DConditionModel(sample_size=8, attention_head_dim=2, **blocks, **sizes)

    def adapted(model):
        torch.manual_seed(1)
        return get_lora_model(model, LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))

    @torch.no_grad()
    def output(model):
        return model(torch.ones(1, 4, 8, 8), torch.tensor([3]), torch.ones(1, 5, 16)).sample

    expected = output(adapted(unet()))
    assert (expected - output(unet())).abs().max() > 1e-3
    by_leaf = {
        "onload_device": torch.device("cpu"),
        "offload_device": torch.device("cpu"),
        "offload_type": "leaf_level",
    }
    for offload in (lambda m: cpu_offload(m, execution_device="cpu"), lambda m: m.enable_group_offload(**by_leaf)):
        model = adapted(unet()) if adapt_first else unet()
        offload(model)
        found = output(model if adapt_first else adapted(model))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
