"""Being written."""


class ItemTrie: ...
