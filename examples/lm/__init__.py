"""A small Llama-3-style mixture-of-experts language model, its data and its training loop.

``model``     the decoder (RMSNorm, rotary embedding, grouped-query attention, SwiGLU) and presets
``norms``     RMSNorm: NVIDIA apex's fused one where it is really there, PyTorch's otherwise
``sources``   real text of four domains that every Python installation has
``data``      requests cut from that text, a held-out split by document, batches for every rank
``upcycle``   a dense model becomes a mixture of experts with the same outputs
``llama``     weights of a ``transformers`` Llama in this decoder
``training``  the pieces of ``examples/train_lm.py``: configuration, engine, loop
``evaluation`` the loss and logits of every held-out request, to compare two runs request by request
"""
