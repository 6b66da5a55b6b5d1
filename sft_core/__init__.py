"""The eight steps of a retraining, in order, as plain Python (no Prefect, no MLflow):

fetch      source -> RawDataset           rows unchanged, as Parquet shards
normalize  RawDataset -> Conversations    map_fn, held-out side, quarantine
pack       Conversations -> PackedDataset tokens, labels, the bin index
train      PackedDataset -> Checkpoint    DeepSpeed QLoRA in a child process
convert    Checkpoint -> Adapter          PEFT folder, fp32 masters bit for bit
merge      Adapter -> MergedModel         a complete HF folder
evaluate   model -> EvaluationReport      per-example scores of one model
register   reports -> verdict             which model consumers should load
"""
