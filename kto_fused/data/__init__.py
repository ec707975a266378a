"""Preference data: records are read from files or ``datasets``, tokenized once, and padded to batches.

Unpaired records have ``prompt``, ``completion`` and ``label`` (true or 1 if somebody liked the completion). Paired
records have ``prompt``, ``chosen`` and ``rejected``. Demonstrations have ``prompt`` and ``completion``, or ``text``, or
``messages``. All may have a ``weight`` >= 0 of their loss, and pairs of a reward model a ``margin``. Texts are strings,
or conversations: lists of ``{"role": ..., "content": ...}``. Records of conversations may have ``tools``, a list of
functions that the chat template writes into the prompt.

``form`` checks one record, ``records`` reads files and datasets of them, ``rendering`` runs chat templates,
``token_rows`` turns records into token ids, ``tokens`` prepares whole datasets with it, ``partners`` draws mismatched
completions, ``packing`` puts several examples into one row, ``collators`` pads batches, and ``cache`` keeps prepared
datasets on disk.
"""
