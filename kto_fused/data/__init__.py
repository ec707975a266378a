"""Preference data: records are read from files or ``datasets``, tokenized once, and padded to batches.

Unpaired records have ``prompt``, ``completion`` and ``label`` (true or 1 if somebody liked the completion). Paired
records have ``prompt``, ``chosen`` and ``rejected``. Texts are strings, or conversations: lists of
``{"role": ..., "content": ...}``. Records of either kind may have a ``weight`` >= 0, which multiplies their loss.

``form`` checks one record, ``records`` reads files and datasets of them, ``rendering`` runs chat templates,
``token_rows`` turns records into token ids, ``tokens`` prepares whole datasets with it, ``partners`` draws mismatched
completions, ``collators`` pads batches, and ``cache`` keeps prepared datasets on disk.
"""
