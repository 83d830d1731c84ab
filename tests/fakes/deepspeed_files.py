"""DeepSpeed files as people have them, each with the cell and batch that is planned, or what the refusal advises."""

ADAMW = (
    '"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}'
)
AUTO_BATCH = (
    '"gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "train_batch_size": "auto", '
    '"train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": false'
)
SCALING = '"loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1'
CPU = '{"device": "cpu", "pin_memory": true}'

REAL: dict[str, tuple[str, str]] = {
    "trainer, stage 2, all auto": (
        f"""{{
        "fp16": {{"enabled": "auto", {SCALING}}}, "bf16": {{"enabled": "auto"}}, {ADAMW},
        "scheduler": {{"type": "WarmupLR", "params": {{"warmup_min_lr": "auto", "warmup_max_lr": "auto",
                       "warmup_num_steps": "auto"}}}},
        "zero_optimization": {{"stage": 2, "offload_optimizer": {CPU}, "allgather_partitions": true,
            "allgather_bucket_size": 2e8, "overlap_comm": true, "reduce_scatter": true, "reduce_bucket_size": 2e8,
            "contiguous_gradients": true}}, "steps_per_print": 2000, {AUTO_BATCH}}}""",
        "zero=2 bf16 32 = 8 x 2 x 2",
    ),
    "trainer, stage 3, all auto": (
        f"""{{
        "fp16": {{"enabled": "auto", {SCALING}}}, "bf16": {{"enabled": "auto"}}, {ADAMW},
        "scheduler": {{"type": "WarmupDecayLR", "params": {{"warmup_min_lr": "auto", "warmup_max_lr": "auto",
                       "warmup_num_steps": "auto", "total_num_steps": "auto"}}}},
        "zero_optimization": {{"stage": 3, "offload_optimizer": {CPU}, "offload_param": {CPU}, "overlap_comm": true,
            "contiguous_gradients": true, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
            "stage3_gather_16bit_weights_on_model_save": true}}, {AUTO_BATCH}}}""",
        "zero=3 bf16 32 = 8 x 2 x 2",
    ),
    "fine-tuning, stage 1, one precision auto": (
        f"""{{"zero_optimization": {{"stage": 1, "overlap_comm": true}}, "bf16": {{"enabled": true}},
        "fp16": {{"enabled": "auto", "auto_cast": false, {SCALING}}}, {AUTO_BATCH}}}""",
        "zero=1 bf16 32 = 8 x 2 x 2",
    ),
    "a template with every device auto": (
        f"""{{"zero_optimization": {{"stage": "auto", "offload_optimizer": {{"device": "auto", "nvme_path": "auto"}},
        "offload_param": {{"device": "auto", "nvme_path": "auto"}},
        "stage3_gather_16bit_weights_on_model_save": "auto"}}, "bf16": {{"enabled": "auto"}}, {AUTO_BATCH}}}""",
        "zero=1 bf16 32 = 8 x 2 x 2",
    ),
    "pretraining from a launch script, with comments": (
        """{
        // sizes
        "train_batch_size": 64, "train_micro_batch_size_per_gpu": 4, "steps_per_print": 10,
        "zero_optimization": {"stage": 1,}, "gradient_clipping": 1.0, "prescale_gradients": true,
        "fp16": {"enabled": true, "loss_scale": 0, "loss_scale_window": 500, "hysteresis": 2, "min_loss_scale": 1,
                 "initial_scale_power": 11},  # half precision
        "wall_clock_breakdown" : false,
        }""",
        "zero=1 fp16 64 = 4 x 8 x 2",
    ),
    "bf16 at stage 0": (
        """{"train_micro_batch_size_per_gpu": 2, "train_batch_size": 32, "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 0}, "bf16": {"enabled": true}, "steps_per_print": 2000}""",
        "zero=0 bf16 32 = 2 x 8 x 2",
    ),
    "fine-tuning with a linear schedule": (
        """{"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 8, "bf16": {"enabled": true},
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-5, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 500, "warmup_min_lr": 0,
                      "warmup_max_lr": 2e-5, "warmup_num_steps": 50, "warmup_type": "linear"}},
        "zero_optimization": {"stage": 2, "overlap_comm": false}}""",
        "zero=2 bf16 64 = 4 x 8 x 2",
    ),
    "nothing but a micro-batch": (
        '{"train_micro_batch_size_per_gpu": 16, "bf16": {"enabled": true}, "zero_optimization": {"stage": 2}}',
        "zero=2 bf16 32 = 16 x 1 x 2",
    ),
    "autocast": (
        """{"train_batch_size": 32, "torch_autocast": {"enabled": true, "dtype": "bfloat16"},
        "zero_optimization": {"stage": 2}}""",
        "zero=2 bf16-autocast 32 = 8 x 2 x 2",
    ),
    "a fixed scale": (
        """{"train_batch_size": 32, "fp16": {"enabled": true, "loss_scale": 128, "initial_scale_power": 32},
        "zero_optimization": {"stage": 2}}""",
        "zero=2 fp16 32 = 8 x 2 x 2",
    ),
    "monitoring without packages": (
        """{"train_batch_size": 32, "csv_monitor": {"enabled": true, "output_path": "logs/", "job_name": "a"},
        "tensorboard": {"enabled": false}, "flops_profiler": {"enabled": true, "profile_step": 1, "module_depth": -1,
        "top_modules": 1, "detailed": true, "output_file": null}}""",
        "zero=1 bf16 32 = 8 x 2 x 2",
    ),
    "a tutorial's, with a schedule that warms up along a logarithm": (
        """{"train_batch_size": 16, "optimizer": {"type": "Adam", "params": {"lr": 0.001, "betas": [0.8, 0.999],
        "eps": 1e-8, "weight_decay": 3e-7}}, "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0,
        "warmup_max_lr": 0.001, "warmup_num_steps": 1000}}, "fp16": {"enabled": true}, "bf16": {"enabled": false}}""",
        'write "warmup_type": "linear", or remove the scheduler and give schedule.kind and schedule.warmup',
    ),
    "an older one, offload off": (
        '{"train_batch_size": 16, "zero_optimization": {"stage": 2, "cpu_offload": false}}',
        "remove zero_optimization.cpu_offload",
    ),
    "an older one, offload on": (
        '{"train_batch_size": 16, "zero_optimization": {"stage": 2, "cpu_offload": true}}',
        "use zero_optimization.offload_optimizer instead",
    ),
    "apex": ('{"train_batch_size": 32, "amp": {"enabled": true, "opt_level": "O1"}}', "remove amp"),
    "one-bit Adam": (
        '{"train_batch_size": 32, "optimizer": {"type": "OneBitAdam", "params": {"lr": 2e-4}}}',
        "use AdamW, which compresses nothing",
    ),
    "elastic, with a curriculum": (
        '{"elasticity": {"enabled": true}, "curriculum_learning": {"enabled": true}, "train_batch_size": 32}',
        "remove elasticity",
    ),
    "NVMe, with a key that was renamed": (
        """{"train_batch_size": 32, "aio": {"block_size": 262144, "queue_depth": 32, "thread_count": 1},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}}""",
        "use aio.intra_op_parallelism, which took its place",
    ),
    "one cycle": (
        """{"train_batch_size": 32, "scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 1e-5,
        "cycle_max_lr": 1e-3}}}""",
        "give schedule.kind (cosine, linear, wsd, constant) and schedule.warmup",
    ),
    "SGD, sharded": (
        """{"train_batch_size": 32, "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": 1}}""",
        "add ds.zero_allow_untested_optimizer=true, or take zero=0",
    ),
    "another program's keys": (
        '{"train_micro_batch_size_per_gpu": 4, "min_lr": 0.00006, "fp16": {"fp16": true, "enabled": true}}',
        "remove min_lr",
    ),
    "pre-scaling at stage 2": (
        '{"train_batch_size": 32, "prescale_gradients": true, "zero_optimization": {"stage": 2}}',
        "drop prescale_gradients and gradient_predivide_factor, or take zero=1",
    ),
    "Python's spelling": ('{\n"train_batch_size": 32,\n"fp16": {"enabled": True}\n}', "fix that place"),
    "a forgotten comma": ('{"train_batch_size": 32 "fp16": {"enabled": true}}', "a comma or the end of a line"),
    "a key of a tracker": (
        '{"train_batch_size": 32, "comet": {"enabled": true, "api_key": "abc"}}',
        "set the environment variable COMET_API_KEY",
    ),
}
