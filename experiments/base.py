"""Every field of a configuration, its default and its meaning: the only list there is.

An experiment imports this module, changes the fields it is about and leaves the rest.
`None` in an optional field means what its comment says; a fraction is a fraction of
`training.steps`, so that any number of steps is valid.
"""

from ml_collections import ConfigDict, config_dict

from research.errors import RequestError, nearest


def get_config() -> ConfigDict:
    """The default of every field, locked: a field that is not here does not exist."""
    c = ConfigDict()

    c.model = m = ConfigDict()  # names are those of DeepSeek's own config.json
    m.attention = "mla"  # mla: latent attention (V2 §2.1) | gqa: grouped queries (Qwen2, Llama 3)
    m.vocab_size = config_dict.placeholder(int)  # None: the tokenizer's size, rounded up to a multiple of 64
    m.hidden_size = 256
    m.intermediate_size = 704  # width of a dense feed-forward
    m.num_hidden_layers = 4
    m.num_attention_heads = 4
    m.num_key_value_heads = 4  # gqa only
    m.head_dim = 64  # gqa only
    m.attention_bias = False  # gqa only: biases of the query, key and value projections (Qwen2)
    m.q_lora_rank = config_dict.placeholder(int)  # None: queries are not compressed
    m.kv_lora_rank = 128
    m.qk_nope_head_dim = 64
    m.qk_rope_head_dim = 32
    m.v_head_dim = 64
    m.first_k_dense_replace = 1  # the first layers are dense
    m.n_routed_experts = 16  # 0: no experts, every layer is dense
    m.n_shared_experts = 1
    m.num_experts_per_tok = 4
    m.moe_intermediate_size = 128
    m.scoring_func = "sigmoid"  # sigmoid (V3) | softmax (V2)
    m.topk_method = "noaux_tc"  # noaux_tc: biased, group score of two | group_limited_greedy: its best | greedy
    m.n_group = 1
    m.topk_group = 1
    m.norm_topk_prob = True
    m.routed_scaling_factor = 1.0
    m.bias_update = "sign"  # sign (V3) | centred (Moonlight) | proportional (2408.15664 Table 3) | none
    m.bias_form = "additive"  # additive: s + b, from 0 | multiplicative: s * b, from 1 (2408.15664 Table 4)
    m.bias_update_speed = 1e-3  # gamma
    m.bias_update_until = 14.3 / 14.8  # fraction of the steps after which gamma is 0
    m.balance_loss = "sequence"  # sequence (V3 Eq. 17-20) | batch (V3 §4.5.3) | expert (V2 Eq. 23-25) | none
    m.aux_loss_alpha = 1e-4
    m.rope_theta = 10000.0
    m.rope_scaling = r = ConfigDict()
    r.type = "default"  # default | yarn | llama3
    r.factor = 1.0
    r.original_max_position_embeddings = 4096
    r.beta_fast = 32.0  # yarn
    r.beta_slow = 1.0  # yarn
    r.mscale = 1.0  # yarn
    r.mscale_all_dim = 1.0  # yarn
    r.low_freq_factor = 1.0  # llama3
    r.high_freq_factor = 4.0  # llama3
    m.max_position_embeddings = 4096
    m.rms_norm_eps = 1e-6
    m.tie_word_embeddings = False
    m.initializer_range = 0.006  # V3 §4.2
    m.attention_implementation = "auto"  # auto | xla | cudnn | reference: see kernels/attention
    m.scan_unroll = 0  # layers in the body of the scan over layers; 0: all on a CPU (faster), one elsewhere
    m.remat = "none"  # none | up_projections (V3 §3.2.3: MLA's; norms always are computed again) | layer

    c.mtp = t = ConfigDict()
    t.num_nextn_predict_layers = 1  # depth M; 0 is off
    t.hidden = "after_norm"  # what the first module reads: the main model's output after_norm | before_norm
    t.loss_weight = 0.3  # lambda
    t.loss_weight_final = 0.1
    t.loss_weight_switch = 10 / 14.8  # fraction of the steps after which lambda is loss_weight_final

    c.precision = p = ConfigDict()
    p.recipe = "float32"  # float32 | bfloat16 | fp8_deepseek | ...: research/precision/recipe.py lists them
    p.high_precision = ""  # projections that an FP8 recipe leaves in bfloat16, by name, separated by commas
    p.implementation = "auto"  # of quantised products: auto (the Pallas kernels on Hopper) | mosaic | xla | reference

    c.data = d = ConfigDict()
    d.source = "stdlib"  # stdlib: the running Python's own source files without its tests | files | huggingface
    d.files = ""  # files: globs separated by commas: text, or JSON lines; .gz too
    d.text_field = "text"  # the field of a JSON line, or of a Hugging Face row, that holds the text
    d.huggingface_dataset = ""  # huggingface: the dataset's name
    d.huggingface_config = ""
    d.huggingface_split = "train"
    d.max_documents = 0  # take only so many documents of the source; 0: all, but of huggingface
    d.tokenizer = "bpe"  # bytes | bpe: trained on the corpus | path of a tokenizer.json or of a folder with one
    d.bpe_vocab_size = 4096
    d.cache = "~/.cache/parsimony"  # tokenizers and token files; safe to delete
    d.validation_fraction = 0.05  # of the documents, by a hash of their content; of one alone, its end
    d.sequence_length = 256
    d.mask_documents = True  # attention never crosses documents; V3's pre-training did not mask
    d.needle_rate = 0.0  # share of the training rows that hide sentences and ask for them: data/needles.py
    d.fim_rate = 0.0  # share of the documents turned to fill-in-the-middle (prefix, suffix, middle); V3: 0.1
    d.prefetch = 8  # batches read ahead

    c.training = t = ConfigDict()
    t.steps = 1000
    t.batch_size = 8  # sequences a step
    t.batch_ramp_start = 0  # sequences of the first step; 0: no ramp (V3: 3072 -> 15360)
    t.batch_ramp_until = 0.032  # fraction of the steps after which the batch is batch_size
    t.accumulation_steps = 1  # the batch in so many pieces, one after another
    t.pipeline_schedule = "1f1b"  # 1f1b | zero_bubble: less idle time, for memory (research/parallel/pipeline.py)
    t.expert_room = 1.5  # room of a device of mesh.expert for pairs, times a balanced router's; more take rounds
    t.seed = 0
    t.ema_decay = 0.0  # of an average of the weights, saved beside them and evaluated in their place; 0: off

    c.optimizer = o = ConfigDict()
    o.name = "adamw"  # adamw | muon: matrices by Muon, the rest by AdamW
    o.learning_rate = 2.2e-4  # of the plateau
    o.warmup_fraction = 0.0085  # V3: 2K steps of 235K
    o.plateau_until = 10 / 14.8
    o.cosine_until = 14.3 / 14.8
    o.cosine_final = 0.1  # learning rate after the cosine, relative to the plateau
    o.tail_from = 14.633 / 14.8
    o.tail_final = 7.3 / 220
    o.beta1 = 0.9
    o.beta2 = 0.95
    o.epsilon = 1e-8
    o.weight_decay = 0.1
    o.clip_norm = 1.0
    o.moment_dtype = "float32"  # float32 | bfloat16 (V3 §3.3.2)

    c.evaluation = e = ConfigDict()
    e.every_steps = 0  # 0: at the end only
    e.batches = 16  # batches of an evaluation during training; the one at the end takes all held-out text
    e.batch_size = 8  # sequences
    e.samples = 4  # continuations of held-out text written to samples.md
    e.sample_tokens = 64  # given and written of each; at most half of data.sequence_length, said where it is cut
    e.sample_temperature = 0.8
    e.decode_prompts = 0  # held-out starts decoded greedily at the end, plain and drafted, for the summary
    e.decode_tokens = 128  # of each; at most what model.max_position_embeddings leaves, said where it is cut
    # --mode=eval with mesh.expert: copies of the experts that evaluation.batches batches load most, as V3 §3.4.1
    e.redundant_experts = 0  # slots beside one for each expert, as many on each device
    e.expert_nodes = 1  # whose devices mesh.expert spans; the gate's groups stay whole, as many on each

    c.mesh = h = ConfigDict()  # devices = the product; the batch is split over data x fsdp x expert
    h.data = 1  # a copy of the weights each
    h.fsdp = 1  # splits every matrix
    h.expert = 1  # splits the routed experts
    h.tensor = 1  # splits heads, feed-forward widths, vocabulary
    h.pipeline = 1  # splits layers into stages; their micro-batches are the pieces of training.accumulation_steps

    c.checkpoint = k = ConfigDict()
    k.every_steps = 200  # besides the one at the end; 0: only that one
    k.keep_last = 2
    k.keep_best = 1  # by the validation loss
    k.initialize_from = ""  # a workdir of ours or a Hugging Face folder: start at step 0 from its weights alone

    return c.lock()


def get_distillation_config() -> ConfigDict:
    """The fields of research.distill: a teacher and a student, each with all of the fields above, and what joins them.

    Which of a model's fields count here: all of `model`, `mtp`, `precision`, `optimizer`, `mesh` and `checkpoint`, of
    `data` tokenizer, bpe_vocab_size, sequence_length and validation_fraction (of the examples), and of `training` all;
    what is read is examples, not `data.source`. With `checkpoint.initialize_from` a model brings its tokenizer along.
    """
    c = ConfigDict()
    c.seed = 0  # of all draws that have no other seed below
    # what the student learns from: reference | reinforced | distilled | unverified | logits | on_policy
    c.method = "distilled"
    c.template = "plain"  # of prompts: plain | deepseek (R1's chat template and its directive for mathematics)
    c.checker_timeout = 5.0  # seconds an answer, at most

    c.task = t = ConfigDict()
    t.source = "arithmetic"  # arithmetic: worked solutions | reasoning_gym (requirements-distill.txt) | files
    t.count = 4000  # problems that are made, for training and test together; of files the first so many, 0: all
    t.seed = c.get_ref("seed") + 0
    t.operations = 3  # arithmetic
    t.digits = 1  # arithmetic: of the numbers it starts from
    t.modulus = 0  # arithmetic: results are least remainders of it; 0: as they are
    t.generator = ""  # reasoning_gym: its name
    t.options = "{}"  # reasoning_gym: the generator's settings, as JSON
    t.files = ""  # files: globs of JSON lines separated by commas; GSM8K's as they are; "": for evaluation alone
    t.test_files = ""  # files: of the test; "": test_fraction of the problems
    t.test_fraction = 0.1
    t.question_field = "question"
    t.answer_field = "answer"
    t.solution_field = ""  # "": what stands before #### in the answer
    t.check = "numeric"  # files: how answers are compared: numeric | latex

    c.cold_start = k = ConfigDict()  # fine-tuning on worked solutions, which both models may begin with
    k.problems = 500  # of the training problems, whose solutions are shown; 0: no cold start
    k.student_steps = 300  # the teacher's are teacher.training.steps; 0: the student begins as it is

    # GRPO, of the teacher and of the student with method="reinforced"; with method="on_policy" the student draws by
    # questions, group_size, minibatches, epochs, max_tokens, temperature and draft_tokens
    c.reinforcement = r = ConfigDict()
    r.teacher_steps = 100  # updates; 0: the cold start is the teacher
    r.student_steps = 100
    r.learning_rate = 1e-4  # constant after the warm-up
    r.warmup_fraction = 0.05
    r.questions = 16  # of a batch
    r.group_size = 8  # G: samples of each question
    r.minibatches = 1  # that a batch is cut into, an update each
    r.epochs = 1  # over the same batch
    r.max_tokens = 96
    r.temperature = 1.0
    r.draft_tokens = 0  # of the multi-token modules, at a time; 0: plain. Same distribution, other draws of a seed
    r.form = "token"  # token (DeepSeekMath Eq. 3) | sequence (R1 Eq. 1-3)
    r.clip = 0.2
    r.kl_weight = 0.001  # beta, of the divergence from the reference
    r.reference_every = 0  # batches after which the policy becomes the reference (R1: 400 updates); 0: the first stay

    c.sampling = s = ConfigDict()
    s.checkpoint = ""  # who is sampled, a workdir or a Hugging Face folder; "": the teacher of this workdir
    s.problems = 0  # the first so many training problems; 0: all
    s.samples = 4  # of each
    s.batch_size = 64
    s.max_tokens = 96
    s.temperature = 0.6
    s.top_p = 0.95
    s.draft_tokens = 0  # as reinforcement.draft_tokens
    s.seed = c.get_ref("seed") + 0

    c.rejection = j = ConfigDict()
    j.max_tokens = 96  # longer ones are not taught
    j.foreign_share = 0.1  # of the letters in scripts that the question does not use, at most
    j.repeated_words = 8  # a run of so many words ...
    j.repeated_times = 4  # ... must not come so often
    j.per_problem = 4  # that are kept

    c.tuning = u = ConfigDict()  # the student's fine-tuning
    u.files = ""  # JSON lines of one's own; "": what the method says
    u.question_field = "question"
    u.response_field = "response"  # reasoning, </think>, answer

    c.logits = g = ConfigDict()  # method="logits": the teacher's distributions at the tokens of the kept samples
    g.direction = "forward"  # forward: KL(teacher || student) | reverse | jensen_shannon, between them
    g.beta = 0.5  # of jensen_shannon: the teacher's weight in the mixture (2306.13649 Eq. 1)
    g.temperature = 1.0
    g.top_k = 16  # tokens stored of each position; the rest counts as one class

    c.on_policy = p = ConfigDict()  # method="on_policy": the teacher's distributions at the student's own samples
    # lambda of GKD (2306.13649 Algorithm 1): the chance of a batch to be the student's own; else it is of the fixed
    # samples that method="distilled" learns from. 1: all are its own; 0: none, supervised distillation
    p.student_data_fraction = 1.0
    p.steps = 120  # updates, with the student's own optimizer and schedule, but for
    p.learning_rate = 1e-3
    p.direction = "reverse"  # reverse: KL(student || teacher) | forward | jensen_shannon
    p.beta = 0.5  # of jensen_shannon, as logits.beta

    c.evaluation = e = ConfigDict()
    e.checkpoint = ""  # who is evaluated besides, a workdir or a Hugging Face folder; then of this workdir nobody
    e.problems = 0  # the first so many of the test; 0: all
    e.samples = 8  # k of pass@1's mean, pass@k and cons@k
    e.batch_size = 64
    e.max_tokens = 96
    e.temperature = 0.6
    e.top_p = 0.95
    e.greedy = True  # one more response, of the likeliest tokens
    e.seed = c.get_ref("seed") + 0
    e.published = ""  # a row of a paper beside ours: whose
    e.published_pass_at_1 = 0.0  # percent; 0: the paper has none
    e.published_cons_at_k = 0.0

    for name in ("teacher", "student"):
        c[name] = model = get_config()
        model.training.seed = c.get_ref("seed") + 0
        model.data.tokenizer, model.data.bpe_vocab_size = "bpe", 300
    return c.lock()


def select(config: ConfigDict, arms: str, sweep: dict | None = None, smoke: dict | None = None) -> ConfigDict:
    """The config with what follows the colon of `--config=FILE.py:arm:smoke` applied, in order.

    sweep: {arm: {`group.field`: value}}, the arms of an ablation beside the values they vary. `smoke` shrinks any
    config to seconds and keeps what makes it itself: its attention, router, precision, multi-token depth (at least one
    module) and data; or it changes the fields of `smoke`.
    """
    sweep = sweep or {}
    for arm in filter(None, arms.split(":")):
        known = (*sweep, "smoke")
        if arm not in known:
            raise RequestError(f"has no arm {arm!r}{nearest(arm, known)}; it has {', '.join(known)}")
        changes = sweep[arm] if arm != "smoke" else _smoke(config) if smoke is None else smoke
        config.update_from_flattened_dict(changes)
    return config


def _smoke(config: ConfigDict) -> dict:
    """A few layers of width 64 on short rows: 20 steps in seconds on two cores."""
    m = config.model
    small = {
        "model.hidden_size": 64, "model.intermediate_size": 128, "model.num_attention_heads": 4,
        "model.num_key_value_heads": 2 if m.num_key_value_heads < m.num_attention_heads else 4, "model.head_dim": 16,
        "model.kv_lora_rank": 32, "model.qk_nope_head_dim": 16, "model.qk_rope_head_dim": 8, "model.v_head_dim": 16,
        "model.num_hidden_layers": 3 if m.n_routed_experts else 2, "model.initializer_range": 0.02,
        "model.vocab_size": None, "model.moe_intermediate_size": 32, "model.max_position_embeddings": 4096,
        "mtp.num_nextn_predict_layers": max(config.mtp.num_nextn_predict_layers, 1),
        "data.tokenizer": "bytes", "data.sequence_length": 64, "data.max_documents": 200,
        "training.steps": 20, "training.batch_size": 8, "training.batch_ramp_start": 0,
        "training.accumulation_steps": 1, "optimizer.learning_rate": 3e-3, "optimizer.warmup_fraction": 0.1,
        "optimizer.plateau_until": max(config.optimizer.plateau_until, 0.1),
        "evaluation.every_steps": 0, "evaluation.batches": 4, "evaluation.samples": 1, "evaluation.sample_tokens": 16,
        "evaluation.decode_prompts": 0,
        "checkpoint.every_steps": 10, "checkpoint.initialize_from": "",
    }
    if m.q_lora_rank is not None:
        small["model.q_lora_rank"] = 48
    if m.n_routed_experts:
        groups = min(m.n_group, 4)
        small |= {"model.n_routed_experts": 16, "model.first_k_dense_replace": min(m.first_k_dense_replace, 1),
                  "model.num_experts_per_tok": min(m.num_experts_per_tok, 4), "model.n_group": groups,
                  "model.topk_group": min(m.topk_group, groups)}
    return small
