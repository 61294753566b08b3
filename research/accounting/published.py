"""Where a published model's sources contradict each other, or what follows from its shape: said beside the account."""

NOTES = {  # total parameters: the model, and what does not agree
    671_026_419_200: ("DeepSeek-V3 and R1", (
        "active: the paper says 37B; the weights' README says 36.7B with embedding and head: with both it is 37.55B, "
        "36.63B is without the embedding",
        "multi-token module: the weights' README says 11.5B, of which 2.4B active with embedding and head: 11.61B and "
        "2.54B, or 11.51B and 2.44B without eh_proj",
        "attention is counted at T x T pairs or half of them: at T = 4,096 280.51 or 249.81 GFLOP a token; 2505.09343 "
        "prints 250",
    )),
    235_741_434_880: ("DeepSeek-V2", (
        "active: the paper's 21B is with or without the embedding (21.38B, 20.85B)",
    )),
    15_706_484_224: ("DeepSeek-V2-Lite", (
        "active: the paper's 2.4B is without the embedding; 2.66B with it",
    )),
    15_960_110_208: ("Moonlight", (
        "the paper's 15.29B, of which 2.24B active, are without embedding and head",
    )),
    72_706_203_648: ("Qwen2.5-72B", (
        "2505.09343 prints 394 GFLOP a token: no counting of this shape gives it; V3's and V2's rule gives 444.9 at "
        "T = 4,096",
    )),
    405_853_388_800: ("Llama 3.1 405B", (
        "2505.09343 prints 2448 GFLOP a token, which at T = 4,096 needs attention at a quarter of the pairs; V3's and "
        "V2's rule, half of them, gives 2473.2",
        "2505.09343 prints 7.28 times V3's cache a token: 516.096 / 70.272 = 7.34",
    )),
}
