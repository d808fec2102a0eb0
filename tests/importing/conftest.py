"""Configurations of other frameworks, written by hand in their form."""

import pytest

FEDSCOPE = """
use_gpu: True
device: 0
early_stop:
  patience: 4
federate:
  mode: standalone
  client_num: 5
  total_round_num: 40
  sample_client_rate: 0.4
  save_to: "some.ckpt"
data:
  root: my_rows
  type: 'mine.json@llm'
  splits: [0.9, 0.05, 0.05]
  splitter: 'lda'
  splitter_args: [{'alpha': 0.3}]
llm:
  tok_len: 320
  adapter:
    use: True
    args: [ { 'adapter_package': 'peft', 'adapter_method': 'lora', 'r': 4, 'lora_alpha': 12, 'lora_dropout': 0.1 } ]
dataloader:
  batch_size: 2
model:
  type: 'some-lab/some-llama@huggingface_llm'
train:
  local_update_steps: 7
  batch_or_epoch: batch
  optimizer:
    lr: 0.002
  is_enable_half: True
trainer:
  type: llmtrainer
eval:
  freq: 8
  metrics: ['loss']
  best_res_update_round_wise_key: val_loss
"""
OPENFEDLLM = """
max_steps=6
num_rounds=30   # not many
lr=3e-5
# dataset_name="another/one"
dataset_name="tatsu-lab/alpaca"
gpu=1

CUDA_VISIBLE_DEVICES=$gpu python main_sft.py \\
 --learning_rate $lr \\
 --model_name_or_path "some-lab/some-llama" \\
 --dataset_name $dataset_name \\
 --dataset_sample 900 \\
 --fed_alg fedyogi \\
 --num_clients 12 \\
 --sample_clients 3 \\
 --max_steps ${max_steps} \\
 --num_rounds $num_rounds \\
 --batch_size 8 --seq_length 256 \\
 --peft_lora_r 4 --peft_lora_alpha 8 --use_peft \\
 --output_dir ./out \\
 --template "vicuna" \\"""
FEDMLLM = """
python main_sft_clustered.py --fed_alg clustered --sim_round 2 --n_clusters 3 --num_clients 10 --sample_clients 10 \\
  --model_name_or_path some-lab/some-llama --dataset_name aya_dataset --split_strategy language_multi_domain \\
  --train_split 0.75 --evaluation_rounds 6,12,30 --use_peft True --sim_alias again
"""
FEDKSEED = "python main.py --rounds 9 --dataset dolly --iid dir0.5 --num_clients 40 -K 512 -m 0.1 --bias_sampling --lr 3e-7 --log"
FLOWERTUNE = """
[build-system]
requires = ["hatchling"]

[project]
name = "my-app"

[tool.flwr.app]
publisher = "me"

[tool.flwr.app.config]
model.name = "some-lab/some-llama"
model.quantization = 8
model.lora.peft-lora-r = 6
model.lora.peft-lora-alpha = 18
train.learning-rate-max = 4e-5
train.learning-rate-min = 2e-6
train.seq-length = 384
train.training-arguments.per-device-train-batch-size = 4
train.training-arguments.max-steps = 5
train.training-arguments.num-train-epochs = 2
train.training-arguments.tf32 = true
train.my-own-switch = 3
strategy.fraction-train = 0.25
strategy.fraction-evaluate = 0.0
num-server-rounds = 12

[tool.flwr.app.config.static]
dataset.name = "some-lab/some-instructions"

[tool.flwr.federations]
default = "local-simulation"

[tool.flwr.federations.local-simulation]
options.num-supernodes = 16
options.backend.client-resources.num-cpus = 2
"""
WRITTEN = {
    "FederatedScope-LLM": FEDSCOPE,
    "OpenFedLLM": OPENFEDLLM,
    "FedMLLM": FEDMLLM,
    "FedKSeed": FEDKSEED,
    "FlowerTune": FLOWERTUNE,
}


@pytest.fixture(params=WRITTEN)
def written(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Return the name of a framework and a configuration of it."""
    return request.param, WRITTEN[request.param]
