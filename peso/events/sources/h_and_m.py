"""H&M: transactions_train.csv and articles.csv, with headers. A purchase has a day, not a time."""

from __future__ import annotations

from pathlib import Path

from peso.events.sources.files import find_named, first_of, require_content
from peso.events.sources.tables import DataSet, ItemTable, Log, Source, csv_table, published_items

ARTICLES = "articles.csv"
TRANSACTIONS = "transactions_train.csv"


class HAndM(DataSet):
    """The purchases and the articles of H&M."""

    name = "h-and-m"
    signs = (TRANSACTIONS,)

    @staticmethod
    def open(path: str) -> Source:
        """Open a folder with ``transactions_train.csv`` and ``articles.csv``, or the file of transactions.

        Raises:
            DataError: there is no file of transactions, or it lacks the published columns.
        """
        sales = find_named(path, TRANSACTIONS)
        table = csv_table([require_content(sales)], ",", header=True)
        table.require_published("customer_id", "article_id", "t_dat")
        articles = first_of(sales.parent, ARTICLES)
        log = Log(table, "customer_id", "article_id", "t_dat", time_format="iso")
        return Source(log, _items(articles) if articles else None)


def _items(file: Path) -> ItemTable:
    table = csv_table([require_content(file)], ",", header=True)
    path = ("index_group_name", "product_group_name", "product_type_name")
    return published_items(table, "article_id", "prod_name", ("colour_group_name", "detail_desc"), path)
