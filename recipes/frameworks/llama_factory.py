"""LLaMA-Factory with selection before each epoch.

python llama_factory.py llama_factory.yaml                                  # settings may follow: learning_rate=1e-4
torchrun --nproc-per-node 2 llama_factory.py llama_factory.yaml             # on several GPUs
"""

from llamafactory.train.tuner import run_exp

from ifd_trainer import SelectLater

if __name__ == "__main__":
    run_exp(callbacks=[SelectLater(keep=0.10)])
