"""SentenceTransformerTrainer with an adapted body: adapters alone are saved, resumed exactly, and the best one restored."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from minipeft import LoraConfig, StateError, get_lora_model
from minipeft.hf import AdapterTrainerMixin

st = pytest.importorskip("sentence_transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = Dataset.from_list([{"a": f"w{10 + i} w{20 + i}", "b": f"w{30 + i} w{21 + i}"} for i in range(16)])


class Adapted(AdapterTrainerMixin, st.SentenceTransformerTrainer):
    pass


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    vocabulary = [*special.values(), *(f"w{i}" for i in range(4, 96))]
    words = Tokenizer(WordLevel({word: place for place, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=96, max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder


def encoder(base):
    from sentence_transformers import models

    model = st.SentenceTransformer(modules=[models.Transformer(str(base), max_seq_length=16), models.Pooling(32)])
    torch.manual_seed(1)
    get_lora_model(model[0].auto_model, LoraConfig(r=4, target_modules=["query", "value"]))
    return model.to("cpu")


def trained(model, out, resume=None, **options):
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    settings |= {"save_steps": 2, "lr_scheduler_type": "constant", "use_cpu": True, "report_to": "none"}
    arguments = st.SentenceTransformerTrainingArguments(str(out), disable_tqdm=True, **{**settings, **options})
    loss = MultipleNegativesRankingLoss(model)
    trainer = Adapted(model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS, loss=loss)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def encoded(model):
    return model.encode(["w10 w20", "w30"], convert_to_tensor=True)


def test_it_trains_saves_reloads_and_resumes_exactly(base, tmp_path):
    model, again = encoder(base), encoder(base)
    trained(model, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not list(checkpoint.rglob("model*.safetensors"))
    trained(again, tmp_path / "run", checkpoint)
    assert torch.equal(encoded(again), encoded(model))
    model.save_pretrained(str(tmp_path / "saved"))
    torch.testing.assert_close(encoded(st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")), encoded(model))


def test_the_best_one_is_there_at_the_end(base, tmp_path):
    """The best is the worst here, which comes first."""
    model, best = encoder(base), encoder(base)
    judged = {"metric_for_best_model": "loss", "greater_is_better": True, "load_best_model_at_end": True}
    trainer = trained(model, tmp_path, eval_strategy="steps", eval_steps=2, **judged)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    trained(best, tmp_path / "two", max_steps=2)
    assert torch.equal(encoded(model), encoded(best))


def test_what_else_trains_is_named(base, tmp_path):
    from sentence_transformers import models

    model = encoder(base)
    model.append(models.Dense(32, 8))
    with pytest.raises(StateError, match=r"trains '2\.linear\.weight'"):
        trained(model, tmp_path)
