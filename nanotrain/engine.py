"""Generation: continue prompts token by token."""

import torch


@torch.no_grad()
def generate(model, tokens, max_new_tokens, temperature=0.8, top_k=50, seed=0, stop=()):
    """Yield the next tokens of one prompt, as ints, until `max_new_tokens` or a token of `stop`.

    tokens: list of ids, BOS first. temperature 0 takes the likeliest token. Longer texts than the model's max_seq_len
    see its last tokens. The draw uses its own generator, so it never touches the state of training.
    """
    device = model.head.weight.device
    generator = torch.Generator().manual_seed(seed)
    tokens = list(tokens)
    for _ in range(max_new_tokens):
        window = torch.tensor([tokens[-model.config.max_seq_len :]], device=device)
        token = pick(model.logits(window)[0, -1].cpu(), temperature, top_k, generator)
        if token in stop:
            return
        yield token
        tokens.append(token)


def pick(logits, temperature, top_k, generator):
    """logits (V,) float32 on the CPU -> one token, drawn from the `top_k` likeliest (0: from all)."""
    if temperature == 0:
        return int(logits.argmax())
    if 0 < top_k < len(logits):
        logits = torch.where(logits < logits.topk(top_k).values[-1], -torch.inf, logits)
    return int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))
