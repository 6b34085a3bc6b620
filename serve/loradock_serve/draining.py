"""Which slots an engine closes, for overdue requests and for pins: as many as these need, and no longer than they do.

The part of the policy in `admission.py` that takes slots away from adapters that use them.
"""

from loradock_serve.lines import Line
from loradock_serve.slots import UNLIMITED, Slots
from loradock_serve.tickets import Ticket


def drain(slots: Slots, overdue: Line, pins_wanted: int) -> bool:
    """Close as many slots as overdue requests and pins need; True where one was opened again instead.

    While seats are what is short (somebody overdue has a slot and no seat), a slot is drained only for a request
    that comes before that one: any other could not use it yet.
    """
    claims = len(overdue.claims)
    if len(slots.closing) > pins_wanted + claims:
        slots.reopen(next(reversed(slots.closing)))
        return True
    ready, claim = overdue.first(UNLIMITED, slot=False), overdue.first_claim()
    if claim is not None and ready is not None:
        claims = int(_rank(claim) < _rank(ready))
    missing = pins_wanted + claims - slots.available - len(slots.closing)
    if missing > 0:
        victims = slots.victims()
        victims.sort(key=lambda victim: (overdue.waits_for(victim), victim.last_begun_at))
        for victim in victims[:missing]:
            slots.close(victim)
    return False


def _rank(ticket: Ticket) -> tuple[float, ...]:
    return (ticket.tenant.counter, ticket.number)
