"""What `finetune` and `train_parallel` are made of.

arguments; activations; sharded_checkpoint, reporting <- parallel_trainer
"""
