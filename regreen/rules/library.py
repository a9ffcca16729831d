"""Every rule there is, in the order in which they are applied."""

from regreen.rules import clients, data, tools, web
from regreen.rules.rule import Rule

RULES: tuple[Rule, ...] = (*web.RULES, *data.RULES, *tools.RULES, *clients.RULES)
BY_NAME = {rule.name: rule for rule in RULES}
