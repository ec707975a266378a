"""Preference data: records read from files or ``datasets``, tokenized once, padded to batches.

Unpaired records hold ``prompt``, ``completion`` and ``label`` (true or 1: somebody liked it), paired ones ``prompt``,
``chosen`` and ``rejected``. Texts are strings, or conversations: lists of ``{"role": ..., "content": ...}``.
"""
