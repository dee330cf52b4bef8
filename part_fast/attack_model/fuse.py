"""Fusion on a CPU: a convolution, what is added to it and its ReLU become one call, in whatever network.

A PackedConv2d adds and cuts off at zero in its own pass over the output. Networks write these as layers, functions or
methods of their own, and the graph that torch.fx traces for `fold` shows where. `fuse` gives modules of the attacked
copy a `FusedForward` as their `forward`: the network, and each block from whose forward the graph has everything.

Which of them run is decided call by call, from the network downwards. A FusedForward runs the graph of all that is in
its module, with fused calls, unless somebody must see into it: hooks hang on a module within, or one was changed. Then
it runs its module's own forward, and the blocks that this calls decide for themselves. So every block stays fused with
CamBudget's hook on `layer4`, and what a hook sees of a layer is what the layer gives in the model. Hooks on a module
itself are run by torch around its forward, whichever that is.

Fused are, where `conv` is a PackedConv2d, with its BatchNorm folded into it or without one:

    relu(conv(x) + y), relu(conv(x)), conv(x) + y     y: of the output's shape
    relu(conv2(relu(conv1(x))) + x)                   a whole residual block, see `packed_conv.residual`

Several convolutions of one input cast it once for all of them, so that their gradients are summed before the cast.
ReLU6 and other activations stay layers of their own behind the convolution, whose pass knows ReLU alone.

Not fused is a convolution whose output something else reads too, nor one between which and its sum or ReLU anything is
written in place: a fused call computes later than the convolution in the model does, and would read what was written.
"""

from __future__ import annotations

import contextvars
import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node

from part_fast import checks
from part_fast.attack_model.cpu import packed_conv
from part_fast.attack_model.cpu.packed_conv import PackedConv2d
from part_fast.attack_model.fold import Folded, FoldedAct
from part_fast.attack_model.follow import flat
from part_fast.attack_model.trace import Call, Trace, is_normalize


def fuse(forward: Trace | str) -> None:
    """Have the modules of a copy whose convolutions are packed run fused.

    forward: what `fold.trace` gives of the copy, before or after folding and packing, under which names stay; a copy
    that it cannot trace runs as it is.
    """
    if isinstance(forward, str):
        return
    modules = dict(forward.model.named_modules())
    nodes = list(forward.graph.nodes)
    made = []
    for call in forward.calls:
        module, within = modules[call.name], nodes[call.first : call.end]
        packs = any(node.op == "call_module" and isinstance(modules[str(node.target)], PackedConv2d) for node in within)
        # What hooks did while the forward was traced is in the graph, which would do it without them too.
        hooked = any(any(_hooks(part)) for part in module.modules())
        if not packs or hooked or "forward" in vars(module) or any(_updates(node, forward.model) for node in within):
            continue
        if (graph := _graph_of(call, within)) is not None:
            made.append(FusedForward(module, forward.model, graph))
            module.forward = made[-1]
    for fused in made:
        fused.watch()


def unfuse(model: nn.Module) -> None:
    """Have all modules of the model run their own forward again."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), FusedForward):
            del module.forward


def fused_convolutions(model: nn.Module) -> int:
    """How many calls of convolutions in the model's forward add or cut off at zero too, or are half a residual block.

    Where the model's own forward runs instead, those in the blocks that it calls.
    """
    forward = vars(model).get("forward")
    if isinstance(forward, FusedForward) and forward.graph is not None:
        calls = [node.target for node in forward.graph.nodes]
        return calls.count(conv_add_relu) + 2 * calls.count(residual)
    return sum(map(fused_convolutions, model.children()))


# ---- the forward that a module is given ----

# Set while a module's own forward is computed for comparison, all of it.
_comparing = contextvars.ContextVar("_comparing", default=False)


class FusedForward:
    """A module's forward: the graph with fused calls, or the module's own where something within must be seen.

    When the graph is to run for the first time, it and the own forward are run unfused and compared: it stands for the
    forward only if the output and the gradients of the inputs are the same, bit for bit. For torch.fx does not see all
    that a forward may do; it may ask what kind of object its input is, say.
    """

    def __init__(self, module: nn.Module, model: nn.Module, graph: Graph | None = None) -> None:
        """module: one of `model`, of which the graph has the names; graph: None for the module's own forward alone."""
        self.module, self.model = module, model
        self._unfused = graph
        self._run: Callable[..., Tensor] | None = None
        self._hooks: list[dict[int, Any]] = []
        self._read: list[tuple[dict[str, Any], str, object]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        # What is copied or pickled is traced anew by its AttackModel, and until then runs its own forward.
        return FusedForward, (self.module, self.model)

    def watch(self) -> None:
        """Notice from now on hooks within the module, and changes to what its forward reads."""
        within = list(self.module.modules())[1:]
        self._hooks = [hooks for part in within for hooks in _hooks(part)]
        self._read = [read for part in (self.module, *within) for read in _read(part)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output."""
        if self._serves(args, kwargs) and (self._run is not None or self._prepare(args)):
            assert self._run is not None
            return self._run(self.model, *args)
        return type(self.module).forward(self.module, *args, **kwargs)

    def _serves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return (
            self._unfused is not None
            and not kwargs
            and all(isinstance(value, Tensor) for value in args)
            and not any(self._hooks)
            and all(table.get(key) is value for table, key, value in self._read)
            and not torch.nn.modules.module._has_any_global_hook()
            and not (_comparing.get() or torch.compiler.is_compiling() or checks.transformed())
        )

    def _prepare(self, args: tuple[Tensor, ...]) -> bool:
        """Make the fused graph a function, if there is one and it does what the forward does."""
        assert self._unfused is not None
        fused = self.graph
        if fused is None:
            self._unfused = None
        elif _same(type(self.module).forward, self.module, _function(self._unfused), self.model, args):
            self._run = _function(fused)
        else:
            self._unfused = None
            warnings.warn(
                f"{type(self.module).__name__} computes something else where torch.fx traces it: AttackModel runs its "
                "own forward, in which convolutions are not fused, and is slower for it",
                stacklevel=2,
            )
        return self._run is not None

    @property
    def graph(self) -> Graph | None:
        """With fused calls; None if there are none."""
        if self._unfused is None:
            return None
        graph = Graph()
        graph.output(graph.graph_copy(self._unfused, {}))
        return graph if _fuse_calls(graph, self.model) else None


def _hooks(module: nn.Module) -> list[dict[int, Any]]:
    return [module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks]


_KEPT_BY_MODULE = frozenset(nn.Module().__dict__)


def _read(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, object]]:
    """What a forward may go by, but for tensors, which the graph reads anew: (table, key, value)."""
    attributes = vars(module)
    yield attributes, "forward", attributes.get("forward")
    if _is_layer(module):
        return  # whose class's forward is not in the graph
    yield attributes, "training", module.training
    yield from ((module._modules, name, child) for name, child in module._modules.items())
    for key, value in attributes.items():
        if key not in _KEPT_BY_MODULE and not any(isinstance(part, Tensor) for part in flat(value)):
            yield attributes, key, value


def _is_layer(module: nn.Module) -> bool:
    kind = type(module)
    if kind in (PackedConv2d, Folded, FoldedAct) or is_normalize(module):
        return True
    return kind.__module__.startswith("torch.nn.") and kind is not nn.Sequential


def _graph_of(call: Call, within: list[Node]) -> Graph | None:
    """The nodes of a call as a graph of its own; None if they read others, or tensors that have no name."""
    graph = Graph()
    copies = {arg: graph.placeholder(f"x{i}") for i, arg in enumerate(call.args)}
    for node in within:
        nameless = node.op == "get_attr" and str(node.target).startswith("_tensor_constant")
        if nameless or not copies.keys() >= set(node.all_input_nodes):
            return None
        copies[node] = graph.node_copy(node, copies.__getitem__)
    if call.out not in copies:
        return None
    graph.output(copies[call.out])
    return graph


def _function(graph: Graph) -> Callable[..., Any]:
    """What the graph computes, of the model whose names it has and its placeholders."""
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(code.src, names)
    function: Callable[..., Any] = names["forward"]
    return function


def _same(
    own: Callable[..., Any],
    module: nn.Module,
    graph: Callable[..., Any],
    model: nn.Module,
    args: tuple[Tensor, ...],
) -> bool:
    """Whether `own(module, *args)` and `graph(model, *args)` have equal bits, and so their gradients for the args."""
    token = _comparing.set(True)
    try:
        expected = _with_gradients(own, module, args)
        try:
            found = _with_gradients(graph, model, args)
        except Exception:  # whatever a forward raises that is run otherwise than it was written for
            return False
    finally:
        _comparing.reset(token)
    return len(found) == len(expected) and all(map(_same_bits, found, expected))


def _with_gradients(run: Callable[..., Any], module: nn.Module, args: tuple[Tensor, ...]) -> list[Any]:
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [arg.detach().clone().requires_grad_(arg.is_floating_point()) for arg in args]
        out = run(module, *(leaf.clone() for leaf in leaves))  # which a forward may write into
        if not isinstance(out, Tensor):
            return []
        floating = [leaf for leaf in leaves if leaf.requires_grad]
        if not (out.requires_grad and floating):
            return [out]
        weights = torch.linspace(-1, 1, out.numel(), device=out.device).to(out.dtype).view(out.shape)
        return [out.detach(), *torch.autograd.grad(out, floating, weights, allow_unused=True)]


def _same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


# ---- fused calls, in a graph ----


def conv_add_relu(conv: PackedConv2d, x: Tensor, other: Any, relu: bool) -> Tensor:
    """`relu(conv(x) + other)`; where other is None, or without ReLU, the rest of it."""
    if other is None or (_adds(other) and other.shape == _out_shape(conv, x.shape)):
        return conv.with_relu(x, other, relu=relu)
    out = conv(x) + other  # which is broadcast, or decides about the dtype
    return F.relu(out) if relu else out


def residual(first: PackedConv2d, second: PackedConv2d, x: Tensor) -> Tensor:
    """`relu(second(relu(first(x))) + x)`."""
    if _adds(x) and x.shape == _out_shape(second, _out_shape(first, x.shape)):
        return packed_conv.residual(first, second, x)
    return conv_add_relu(second, first.with_relu(x), x, True)


def cast(x: Tensor, *convs: PackedConv2d) -> Tensor:
    """x in the dtype in which all of these compute; as it is where they differ."""
    dtypes = {conv.computes_in(x) for conv in convs}
    return x.to(dtypes.pop()) if len(dtypes) == 1 else x


def _adds(other: Any) -> bool:
    """Whether a sum with it may have the convolution's dtype."""
    return isinstance(other, Tensor) and other.ndim == 4 and other.dtype in (torch.float32, torch.bfloat16)


def _out_shape(conv: nn.Conv2d, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the convolution's output for inputs (N,C,H,W) of that shape; () for others."""
    if len(shape) != 4:
        return ()
    padding: Any = conv.padding  # numbers, in a PackedConv2d
    sizes = zip(shape[2:], conv.kernel_size, conv.stride, padding, conv.dilation, strict=True)
    return (
        shape[0],
        conv.out_channels,
        *((n + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for n, kernel, stride, pad, dilation in sizes),
    )


def _fuse_calls(graph: Graph, model: nn.Module) -> bool:
    """Put fused calls into the graph in place of what they compute; whether there are any."""
    for node in list(graph.nodes):
        if _is_identity(_module(node, model)):
            node.replace_all_uses_with(_args(node)[0])
            graph.erase_node(node)
    order = {node: i for i, node in enumerate(graph.nodes)}
    writes = {node for node in graph.nodes if _writes(node, model)}

    def put(chain: list[Node], function: Callable[..., Tensor], *args: Any) -> None:
        with graph.inserting_before(chain[-1]):
            call = graph.call_function(function, args)
        order[call] = order[chain[-1]]
        chain[-1].replace_all_uses_with(call)
        for node in reversed(chain):
            graph.erase_node(node)
        writes.difference_update(chain)

    def crosses(start: Node, end: Node, chain: list[Node]) -> bool:
        """Whether something is written in place between two nodes, other than what the chain computes."""
        return any(order[start] < order[node] < order[end] for node in writes.difference(chain))

    for conv in [node for node in graph.nodes if _is_packed(node, model)]:
        chain, other, relu = [conv], None, False
        while not relu and (user := _only_user(chain[-1])) is not None and not crosses(conv, user, chain):
            if _is_relu(user, model):
                relu = True
            elif other is None and (added := _added(user, chain[-1])) is not None:
                # Of two convolutions the left one adds the other, which has been tried if it comes first.
                left_is_to_come = added is user.args[0] and _is_packed(added, model) and order[added] > order[conv]
                if left_is_to_come and _only_user(added) is user:
                    break
                other = added
            else:
                break
            chain.append(user)
        if relu or other is not None:
            with graph.inserting_before(conv):
                layer = graph.get_attr(str(conv.target))
            order[layer] = order[conv]
            put(chain, conv_add_relu, layer, conv.args[0], other, relu)

    for second in [node for node in graph.nodes if node.target is conv_add_relu]:
        layer, first, other, relu = _args(second)
        if not relu or first.target is not conv_add_relu or _only_user(first) != second:
            continue
        if first.args[1:] == (other, None, True) and not crosses(first, second, []):
            put([first, second], residual, first.args[0], layer, other)

    _cast_once(graph, model, crosses)
    return any(node.target in (conv_add_relu, residual) for node in graph.nodes)


def _cast_once(graph: Graph, model: nn.Module, crosses: Callable[[Node, Node, list[Node]], bool]) -> None:
    """Where several convolutions have one input, give them a cast of it."""
    readers: dict[Node, list[tuple[Node, Any, int]]] = {}  # with the layer's name, and the place of the argument
    for node in graph.nodes:
        if node.target is conv_add_relu:
            readers.setdefault(_args(node)[1], []).append((node, _args(node)[0].target, 1))
        elif _is_packed(node, model):
            readers.setdefault(_args(node)[0], []).append((node, node.target, 0))
    for x, calls in readers.items():
        first, last = calls[0][0], calls[-1][0]
        if len(calls) == 1 or crosses(first, last, []):
            continue
        with graph.inserting_before(first):
            shared = graph.call_function(cast, (x, *(graph.get_attr(name) for _, name, _ in calls)))
        for node, _, place in calls:
            node.update_arg(place, shared)


def _args(node: Node) -> tuple[Any, ...]:
    return node.args


def _only_user(node: Node) -> Node | None:
    """What alone reads the node, and once."""
    users = list(node.users)
    if len(users) != 1 or users[0].op == "output" or sum(arg is node for arg in users[0].args) != 1:
        return None
    return None if node in users[0].kwargs.values() else users[0]


def _module(node: Node, model: nn.Module) -> nn.Module | None:
    """The layer that is called with one argument, and does what its class does."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    layer = model.get_submodule(str(node.target))
    return None if "forward" in vars(layer) else layer


def _is_identity(layer: nn.Module | None) -> bool:
    if isinstance(layer, FoldedAct):
        return _is_identity(layer.drop) and _is_identity(layer.act)
    return type(layer) in (nn.Identity, Folded)


def _is_packed(node: Node, model: nn.Module) -> bool:
    return type(_module(node, model)) is PackedConv2d


def _is_relu(node: Node, model: nn.Module) -> bool:
    layer = _module(node, model)
    if isinstance(layer, FoldedAct):
        return _is_identity(layer.drop) and type(layer.act) is nn.ReLU
    if node.op == "call_function":
        return node.target in (F.relu, torch.relu, torch.relu_) and len(node.args) >= 1
    return type(layer) is nn.ReLU or (node.op == "call_method" and node.target in ("relu", "relu_"))


def _added(node: Node, to: Node) -> Node | None:
    """What the node adds to `to`, if that can be left out and the sum be a tensor of its own."""
    sums = {"call_function": (operator.add, operator.iadd, torch.add), "call_method": ("add", "add_")}
    if node.target not in sums.get(node.op, ()) or len(node.args) != 2 or node.kwargs:
        return None
    left, right = _args(node)
    if left is to:
        return right if isinstance(right, Node) else None
    written = node.target in (operator.iadd, "add_")  # into the left one
    return left if isinstance(left, Node) and not written else None


def _writes(node: Node, model: nn.Module) -> bool:
    """Whether the node may write into a tensor that is there already."""
    if node.op == "call_module":
        layer = model.get_submodule(str(node.target))
        return (
            not _is_layer(layer)
            or "forward" in vars(layer)
            or any(getattr(part, "inplace", False) for part in layer.modules())
        )
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op != "call_function":
        return False
    name, home = getattr(node.target, "__name__", "_"), getattr(node.target, "__module__", None) or "torch"
    known = home.partition(".")[0] in ("torch", "_operator", "builtins", "math")
    flags = (*node.args, node.kwargs.get("inplace"), "out" in node.kwargs)  # F.relu(x, True)
    return not known or name in _IN_PLACE or name.endswith("_") or any(flag is True for flag in flags)


def _updates(node: Node, model: nn.Module) -> bool:
    """Whether the node writes into a tensor that a module keeps, which a comparison would write into once more."""
    if not _writes(node, model):
        return False
    into: Any = node.kwargs.get("out", _args(node)[0] if node.args else None)
    while isinstance(into, Node) and (into.op == "call_method" or into.target is operator.getitem):
        into = _args(into)[0]  # of which the other may be a view
    return isinstance(into, Node) and into.op == "get_attr"


_IN_PLACE = {name for name in dir(operator) if name.startswith("i") and hasattr(operator, f"__{name}__")} | {"setitem"}
