"""What `finetune` and `train_parallel` are made of.

arguments; sharded_checkpoint, reporting <- parallel_trainer
"""
