"""The physics of laser hockey on Box2D: two rackets, a puck, walls and goals. Lengths in units, 60 pixels each; 50 steps per second.

The numbers are those of the ``hockey`` package (martius-lab/hockey-env, version 2.6), so that agents play alike in both. Positions and
everything in :class:`RinkState` are relative to the rink's centre. Player one defends the left goal, player two the right one; player
two's actions are in a view of its own, in which it is player one: the rink turned by half a turn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import Box2D

WIDTH, HEIGHT = 10.0, 8.0
"""Size of the world, with what lies outside the walls."""
CENTER_X, CENTER_Y = WIDTH / 2, HEIGHT / 2
DT = 1 / 50
"""Seconds per step."""
PIXEL = 1 / 60
PUCK_RADIUS = 13 * PIXEL
GOAL_X, GOAL_HALF = 255 * PIXEL, (10 * PIXEL, 75 * PIXEL)
"""Distance of the goals' middles from the centre line, and their half sizes."""
RACKET = ((-0.2, 0.4), (0.1, 0.4), (0.1, -0.4), (-0.2, -0.4), (-0.36, -0.2), (-0.42, 0.0), (-0.36, 0.2))
"""Player one's racket around its origin; its flat side looks at the opponent. Player two's is its mirror image."""


def _walls() -> list[tuple[tuple[float, float], ...]]:
    bar = [(x * PIXEL, y * PIXEL) for x, y in ((-250, -10), (250, -10), (250, 10), (-250, 10))]
    post = [(x * PIXEL, y * PIXEL) for x, y in ((-10, 135), (10, 128), (10, -5), (-10, -5))]
    walls = [tuple((x, top * 3.5 + y) for x, y in bar) for top in (1, -1)]
    for left, top in itertools.product((1, -1), (-1, 1)):
        walls.append(tuple((left * (x - 245 * PIXEL), top * (3.5 - y)) for x, y in post))
    return walls


WALLS = _walls()
"""Corners of the bars at both sides, and of the four posts beside the goals, around the rink's centre."""

PUSH, TURN, SHOT = 6000.0, 400.0, 60.0
"""Force and torque of an action of 1, and speed that a shot adds."""
STRIP = 0.5
"""Distance from the centre line within which rackets are braked."""
BACK, SIDE = 3.5, 2.8
"""Where the border rule begins, from the centre: behind, and to the sides."""
MAX_SPEED, MAX_ANGLE = 10.0, math.pi / 3
DRIVE_DAMPING, BRAKE_DAMPING = 5.0, 20.0
TURN_DAMPING, OVERTURN_DAMPING = 2.0, 10.0
PUCK_DAMPING, FAST_PUCK_DAMPING, FAST_PUCK = 0.05, 10.0, 25.0
CATCH_SPEED = 0.1
"""A racket catches a puck that goes away from it at less than this."""
HOLD = 15
"""Value of the hold counter right after a catch."""
VELOCITY_ITERATIONS, POSITION_ITERATIONS = 180, 60

_RACKET_BITS, _PUCK_BITS, _ALL_BITS = 0x10, 0x01, 0x11


class RinkState(NamedTuple):
    """All of a rink that moves; engine contact caches are not part of it."""

    player1: tuple[float, float, float, float, float, float]  # x, y, angle, velocities of these three
    player2: tuple[float, float, float, float, float, float]
    puck: tuple[float, float, float, float, float]  # x, y, their velocities, spin
    held: tuple[int, int]  # hold counters


class _Part(NamedTuple):
    """What a body is built from, in each world anew; the definition does not keep the shape alive."""

    definition: Any
    shape: Any


def _part(shape: Any, x: float, y: float, *fixtures: dict[str, Any], moves: bool = False, name: tuple[str, int] | None = None) -> _Part:
    made = [Box2D.b2FixtureDef(shape=shape, **fixture) for fixture in fixtures]
    kind = Box2D.b2_dynamicBody if moves else Box2D.b2_staticBody
    return _Part(Box2D.b2BodyDef(type=kind, position=(CENTER_X + x, CENTER_Y + y), fixtures=made, userData=name), shape)


def _wall(corners: tuple[tuple[float, float], ...]) -> _Part:
    x, y = (sum(values) / len(values) for values in zip(*corners, strict=True))
    shape = Box2D.b2PolygonShape(vertices=[(corner[0] - x, corner[1] - y) for corner in corners])
    return _part(shape, x, y, {"friction": 0.1, "categoryBits": _ALL_BITS, "maskBits": _ALL_BITS})


def _goal(sign: int) -> _Part:
    """A sensor for the puck, and what keeps rackets out."""
    sensor = {"isSensor": True, "friction": 0.1, "categoryBits": _RACKET_BITS, "maskBits": _PUCK_BITS}
    solid = {"friction": 0.1, "categoryBits": _RACKET_BITS, "maskBits": _RACKET_BITS}
    return _part(Box2D.b2PolygonShape(box=GOAL_HALF), sign * GOAL_X, 0.0, sensor, solid, name=("goal", sign))


def _racket(player: int, sign: int) -> _Part:
    shape = Box2D.b2PolygonShape(vertices=[(sign * x, y) for x, y in RACKET])
    fixture = {"density": 200 / 1.2, "friction": 1.0, "categoryBits": _RACKET_BITS, "maskBits": _ALL_BITS}
    return _part(shape, 0.0, 0.0, fixture, moves=True, name=("racket", player))


def _puck() -> _Part:
    fixture = {"density": 7.0, "friction": 0.1, "restitution": 0.95, "categoryBits": _PUCK_BITS, "maskBits": _RACKET_BITS}
    return _part(Box2D.b2CircleShape(radius=PUCK_RADIUS), 0.0, 0.0, fixture, moves=True, name=("puck", 0))


_WALLS, _GOALS = [_wall(corners) for corners in WALLS], [_goal(-1), _goal(1)]
_RACKETS, _PUCK = [_racket(0, 1), _racket(1, -1)], _puck()


class Body(NamedTuple):
    """A racket or the puck as the engine has it; its place and velocity are the engine's own, and change with it."""

    body: Any
    place: Any  # x, y
    velocity: Any  # x, y
    mass: float


class Rink:
    """A rink in motion.

    Args:
        keep_mode: rackets catch the puck, hold it up to 14 steps, and shoot.
    """

    def __init__(self, keep_mode: bool = True) -> None:
        self.keep_mode = keep_mode
        self.winner = 0
        """1 once the puck was in the right goal, -1 once it was in the left one."""
        self.held = [0, 0]
        """Hold counters: steps that each player may still hold the puck, and one more."""
        self._thrown: tuple[float, float] | None = None
        self._build()

    def __getstate__(self) -> dict[str, Any]:
        return {"keep_mode": self.keep_mode, "winner": self.winner, "thrown": self._thrown, "state": self.state if self.players else None}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.keep_mode, self.held = saved["keep_mode"], [0, 0]
        self._build()
        if saved["state"] is not None:
            self.place(saved["state"])
        self.winner, self._thrown = saved["winner"], saved["thrown"]

    def _build(self) -> None:
        self._world = Box2D.b2World(gravity=(0.0, 0.0), doSleep=True)
        self._listener = _Contacts(self)  # the world does not keep it alive
        self._world.contactListener = self._listener
        for part in (*_WALLS, *_GOALS):
            self._world.CreateBody(part.definition)
        self.players: list[Any] = []
        self.puck: Any = None
        self._bodies: list[Body] = []

    def place(self, state: RinkState) -> None:
        """Put rackets and puck where they are to be, in a world made anew, and forget goals.

        A world that was played in finds contacts in another order, and a game played again would differ in the last digits.
        """
        self._build()
        *self.players, self.puck = (self._world.CreateBody(part.definition) for part in (*_RACKETS, _PUCK))
        self._bodies = [in_engine(body) for body in (*self.players, self.puck)]
        self.winner, self._thrown = 0, None
        self.move(state)

    def move(self, state: RinkState) -> None:
        """Move rackets and puck as they are; neither contact caches nor goals change."""
        for body, (x, y, angle, vx, vy, spin) in zip(self.players, (state.player1, state.player2), strict=True):
            body.position, body.angle = (x + CENTER_X, y + CENTER_Y), angle
            body.linearVelocity, body.angularVelocity = (vx, vy), spin
        x, y, vx, vy, spin = state.puck
        self.puck.position = (x + CENTER_X, y + CENTER_Y)
        self.puck.linearVelocity, self.puck.angularVelocity = (vx, vy), spin
        self.held = list(state.held)

    @property
    def state(self) -> RinkState:
        """Where everything is, and how it moves."""
        one, two, puck = self._bodies
        return state_of(one, two, puck, (self.held[0], self.held[1]))

    def throw_puck(self, vx: float, vy: float) -> None:
        """Let the next step speed up the puck by this, less its damping."""
        self._thrown = vx, vy

    def step(self, action1: Sequence[float], action2: Sequence[float]) -> None:
        """Let both players push, turn and, in keep mode, shoot, each entry in [-1, 1], and go on by one step."""
        one, two, (puck, _, velocity, _) = self._bodies
        _push(one, action1[0] * PUSH, action1[1] * PUSH, 1)
        _turn(one, action1[2])
        _push(two, -action2[0] * PUSH, -action2[1] * PUSH, -1)
        _turn(two, action2[2])
        puck.linearDamping = FAST_PUCK_DAMPING if math.hypot(velocity.x, velocity.y) > FAST_PUCK else PUCK_DAMPING
        if self.keep_mode:
            if self.held[0] > 1:
                self._hold(0, action1[3] > 0.5)
            if self.held[1] > 1:
                self._hold(1, action2[3] > 0.5)
        if self._thrown is not None:
            force = [speed * self.puck.mass / DT for speed in self._thrown]
            self.puck.ApplyForceToCenter(force, True)
            self._thrown = None
        self._world.Step(DT, VELOCITY_ITERATIONS, POSITION_ITERATIONS)

    def _hold(self, player: int, shoots: bool) -> None:
        """Carry the puck, and shoot it on command or when its time is over."""
        body, puck = self.players[player], self.puck
        puck.position, puck.linearVelocity = body.position, body.linearVelocity
        self.held[player] -= 1
        if shoots or self.held[player] == 1:
            strength = (SHOT if player == 0 else -SHOT) * puck.mass
            impulse = strength * math.cos(body.angle), strength * math.sin(body.angle)
            puck.ApplyLinearImpulse(impulse, puck.worldCenter, True)
            self.held[player] = 0

    def touched(self, player: int) -> None:
        """Catch the puck that this player's racket begins to touch, unless it goes away."""
        vx = self.puck.linearVelocity[0]
        if self.keep_mode and self.held[player] == 0 and (vx < CATCH_SPEED if player == 0 else vx > -CATCH_SPEED):
            self.held[player] = HOLD


class _Contacts(Box2D.b2ContactListener):
    """Tells the rink of catches and goals."""

    def __init__(self, rink: Rink) -> None:
        super().__init__()
        self._rink = rink

    def BeginContact(self, contact: Any) -> None:  # noqa: N802, the engine's name
        one, two = contact.fixtureA.body.userData, contact.fixtureB.body.userData
        if one is None or two is None:
            return
        kinds = {one[0]: one[1], two[0]: two[1]}
        if "puck" not in kinds:
            return
        if "racket" in kinds:
            self._rink.touched(kinds["racket"])
        elif "goal" in kinds:
            self._rink.winner = kinds["goal"]


def in_engine(body: Any) -> Body:
    """Return a body of the engine's with what is read of it in each step; it may be used as long as its world is there."""
    return Body(body, body.position, body.linearVelocity, body.mass)


def state_of(one: Body, two: Body, puck: Body, held: tuple[int, int]) -> RinkState:
    """Return where both rackets and the puck are, and how they move."""
    body, place, velocity, _ = puck
    lies = place.x - CENTER_X, place.y - CENTER_Y, velocity.x, velocity.y, body.angularVelocity
    return RinkState(_motion(one), _motion(two), lies, held)


def _motion(racket: Body) -> tuple[float, float, float, float, float, float]:
    body, place, velocity, _ = racket
    return place.x - CENTER_X, place.y - CENTER_Y, body.angle, velocity.x, velocity.y, body.angularVelocity


def _push(racket: Body, fx: float, fy: float, side: int) -> None:
    """Apply a force, within what borders, centre line and speed allow; ``side`` is 1 for player one, -1 for player two."""
    body, place, velocity, mass = racket
    x, y, vx, vy = place.x - CENTER_X, place.y - CENTER_Y, velocity.x, velocity.y
    if side * x > -STRIP:
        body.linearDamping = BRAKE_DAMPING
        fx = (-2 * vx if side * vx > 0 else 0.0) - side * x * vx
        fx *= mass / DT
    else:
        speed = math.hypot(vx, vy)
        body.linearDamping = DRIVE_DAMPING if speed < MAX_SPEED else BRAKE_DAMPING
        if speed >= MAX_SPEED and math.hypot(vx + DT * fx / mass, vy + DT * fy / mass) >= speed:
            return
    if fx * side < 0 if side * x < -BACK else side * x > 0 and fx * side > 0:
        velocity.x = fx = 0.0
    if (y > SIDE or y < -SIDE) and fy * y > 0:
        velocity.y = fy = 0.0
    body.ApplyForceToCenter((fx, fy), True)


def _turn(racket: Body, action: float) -> None:
    """Turn a racket, within 60 degrees; beyond, turn it back."""
    body, _, _, mass = racket
    angle = body.angle
    if -MAX_ANGLE <= angle <= MAX_ANGLE:
        body.angularDamping = TURN_DAMPING
        torque = action * TURN
    else:
        spin = body.angularVelocity
        body.angularDamping = OVERTURN_DAMPING
        torque = -0.1 * (angle + (spin if angle * spin > 0 else 0.0)) * mass / DT
    body.ApplyTorque(torque, True)
