"""Products of groups of rows, each with a matrix of its own; and of groups of columns.

In the tables of the documents: S for one tensor in a list, M for many; x, weight, y in this order.
"""

from __future__ import annotations

import torch

from . import operator
from .limit import FLOATS, Limit

_LONGEST_LIST = 128
_MOST_GROUPS = 1024
_INNER = 65536
_NAME = "npu_grouped_matmul"
_PAGE = "aclnnGroupedMatmulV5"
_TABLE = f"{_PAGE}, groupType constraints"

LISTS = Limit(_NAME, "lists have 1 to 128 tensors", "列表最大长度为128")
DTYPES = Limit(
    _NAME,
    "x and weight have one dtype: float16, bfloat16 or float32",
    "x: torch.float16, torch.bfloat16, torch.float32",
)
FLOAT32_SINGLE = Limit(
    _NAME,
    "float32 with a tensor for group_list needs single tensors",
    "None/torch.float32(仅x/weight/y均为单张量)",
)
INNER = Limit(_NAME, "the last axis in memory is less than 65536", "最后一维大小都应小于InnerLimit")
GROUP_TYPE = Limit(_NAME, "group_type is -1, 0 or 2", "The value can be -1, 0, or 2", page=_PAGE)
GROUP_LIST = Limit(_NAME, "group_list is 1-D, int64", "数据类型支持torch.int64")
GROUP_LIST_TYPE = Limit(_NAME, "group_list_type is 0 or 1", "可取值0或1")
ONE_GROUP = Limit(
    _NAME,
    "sizes (group_list_type 1) are of at least two groups",
    "当group_list_type为1时, group_list必须为非负数列, 且长度不能为1",
)
GROUPS = Limit(_NAME, "there are at most 1024 groups", "即最多支持1024个group")
GROUPS_ARE_WEIGHTS = Limit(
    _NAME, "group_list has an entry for every matrix", "长度与weight列表长度相同"
)
GROUP_VALUES = Limit(
    _NAME,
    "group_list is not negative, does not fall where cumulative, and ends within the axis",
    "must be a non-negative, monotonically non-decreasing sequence",
    page=f"{_PAGE}, Common constraints",
)
SPLIT_SINGLE = Limit(_NAME, "group_type 0 and 2: split_item is 2 or 3", "仅支持split_item为2或3")
SPLIT_MULTIPLE = Limit(_NAME, "group_type -1: split_item is 0 or 1", "仅支持split_item为0或1")
NO_GROUPS = Limit(_NAME, "group_type -1: no group_list", "group_list必须传空")
SHAPES = Limit(
    _NAME,
    "x is 2-D; one weight is 3-D, several are 2-D with one number of columns",
    "weight中tensor需为3维, x、y中tensor需为2维",
)
X_TRANSPOSED = Limit(_NAME, "group_type -1 and 0: x is not transposed", "x不支持转置")
ONE_WAY = Limit(
    _NAME, "all weights of a list are transposed, or none", "weight中每个tensor是否转置需保持统一"
)
K_SHAPES = Limit(
    _NAME,
    "group_type 2: one x and one weight, both 2-D",
    "The tensors in x and weight must be 2D, and the tensor in y must be 3D",
    page=_TABLE,
)
K_X_TRANSPOSED = Limit(
    _NAME,
    "group_type 2: x is the transposed view of a contiguous tensor",
    "x must be transposed",
    page=_TABLE,
)
K_WEIGHT = Limit(
    _NAME, "group_type 2: weight is not transposed", "weight cannot be transposed", page=_TABLE
)
LIST_GROUP_TYPE = Limit(
    _NAME,
    "with a list of int for group_list, group_type is None",
    "group_list输入类型为List[int]时仅支持传入None",
)
LIST_ENDS = Limit(
    _NAME,
    "a list of int ends with the rows of x",
    "必须传group_list, 且最后一个值与x中tensor的第一维相等",
)

Tensors = list[torch.Tensor]


def _is_transposed(tensor: torch.Tensor) -> bool:
    """Whether the last two axes are swapped in memory: shape [M, K], strides [1, M]."""
    return not tensor.is_contiguous() and tensor.mT.is_contiguous()


def _common_limits(x: Tensors, weight: Tensors) -> None:
    LISTS.require(0 < len(x) <= _LONGEST_LIST and 0 < len(weight) <= _LONGEST_LIST)
    dtypes = {tensor.dtype for tensor in (*x, *weight)}
    DTYPES.require(len(dtypes) == 1 and dtypes < set(FLOATS))
    INNER.require(all(t.shape[-2 if _is_transposed(t) else -1] < _INNER for t in (*x, *weight)))


def _rows_limits(x: Tensors, weight: Tensors) -> None:
    """One x in groups of rows, for a stack of matrices or a list of them."""
    one = len(weight) == 1 and weight[0].dim() == 3
    columns = {matrix.shape[-1] for matrix in weight}
    two = all(matrix.dim() == 2 for matrix in weight)
    SHAPES.require(all(t.dim() == 2 for t in x) and (one or (two and len(columns) == 1)))
    X_TRANSPOSED.require(not any(map(_is_transposed, x)))
    ONE_WAY.require(len({_is_transposed(matrix) for matrix in weight}) == 1)


def _tensor_limits(
    x: Tensors,
    weight: Tensors,
    group_list: torch.Tensor | None,
    split_item: int,
    group_type: int | None,
    group_list_type: int,
) -> None:
    _common_limits(x, weight)
    GROUP_TYPE.require(group_type in (-1, 0, 2))
    if x[0].dtype == torch.float32:
        FLOAT32_SINGLE.require(len(x) == 1 and len(weight) == 1)
    if group_type == -1:
        NO_GROUPS.require(group_list is None)
        SPLIT_MULTIPLE.require(split_item in (0, 1))
        X_TRANSPOSED.require(not any(map(_is_transposed, x)))
        ONE_WAY.require(len({_is_transposed(matrix) for matrix in weight}) == 1)
        return
    if len(x) > 1 or (group_type == 2 and group_list is None):
        raise NotImplementedError(f"npusim: {_NAME} of several x, or of columns with no group_list")
    GROUP_LIST.require(
        group_list is not None and group_list.dim() == 1 and group_list.dtype == torch.int64
    )
    assert group_list is not None
    GROUP_LIST_TYPE.require(group_list_type in (0, 1))
    ONE_GROUP.require(group_list_type == 0 or len(group_list) > 1)
    GROUPS.require(len(group_list) <= _MOST_GROUPS)
    SPLIT_SINGLE.require(split_item in (2, 3))
    if group_type == 0:
        _rows_limits(x, weight)
        matrices = weight[0].shape[0] if weight[0].dim() == 3 else len(weight)
        GROUPS_ARE_WEIGHTS.require(len(group_list) == matrices)
    else:
        K_SHAPES.require(len(x) == len(weight) == 1 and x[0].dim() == weight[0].dim() == 2)
        K_X_TRANSPOSED.require(x[0].mT.is_contiguous())
        K_WEIGHT.require(not _is_transposed(weight[0]))
    _sizes(group_list.tolist(), group_list_type, x[0].shape[0 if group_type == 0 else 1])


def _list_limits(
    x: Tensors,
    weight: Tensors,
    group_list: list[int] | None,
    split_item: int,
    group_type: None,
    group_list_type: int,
) -> None:
    _common_limits(x, weight)
    LIST_GROUP_TYPE.require(group_type is None)
    SPLIT_SINGLE.require(split_item in (2, 3))
    _rows_limits(x, weight)
    GROUPS_ARE_WEIGHTS.require(group_list is not None and len(group_list) == len(weight))
    assert group_list is not None
    LIST_ENDS.require(group_list[-1] == x[0].shape[0])
    _sizes(list(group_list), 0, x[0].shape[0])


def _sizes(values: list[int], group_list_type: int, total: int) -> list[int]:
    """The size of every group, from sizes or from their cumulative sums."""
    if group_list_type == 1:
        sizes = values
    else:
        sizes = [value - before for before, value in zip([0, *values], values)]
    GROUP_VALUES.require(all(size >= 0 for size in sizes) and sum(sizes) <= total)
    return sizes


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return (left.float() @ right.float()).to(left.dtype)


def _rows(x: torch.Tensor, matrices: Tensors, sizes: list[int]) -> torch.Tensor:
    """(M, K) rows in groups, a (K, N) matrix for each -> (M, N).

    Rows past the last group are not written: NaN here, what was in memory on the device.
    """
    y = x.new_full((x.shape[0], matrices[0].shape[-1]), float("nan"))
    start = 0
    for matrix, size in zip(matrices, sizes):
        y[start : start + size] = _product(x[start : start + size], matrix)
        start += size
    return y


def _columns(x: torch.Tensor, weight: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """(M, K) by (K, N), K in groups -> (groups, M, N); an empty group gives zeros."""
    parts = torch.split(x[:, : sum(sizes)], sizes, 1), torch.split(weight[: sum(sizes)], sizes, 0)
    return torch.stack([_product(left, right) for left, right in zip(*parts)])


@operator("npu_grouped_matmul", limits=_tensor_limits)
def grouped_matmul(
    x: Tensors,
    weight: Tensors,
    group_list: torch.Tensor | None,
    split_item: int,
    group_type: int,
    group_list_type: int,
) -> Tensors:
    """group_type 0: rows of x by group (S S S, S M S). 2: the groups' weight gradients (S S S).

    -1: x[i] @ weight[i] (M M M). The wheel has no backward for it.
    """
    if group_list is None:
        return [_product(left, right) for left, right in zip(x, weight, strict=True)]
    sizes = _sizes(group_list.tolist(), group_list_type, x[0].shape[0 if group_type == 0 else 1])
    if group_type == 2:
        return [_columns(x[0], weight[0], sizes)]
    return [_rows(x[0], list(weight[0]) if weight[0].dim() == 3 else weight, sizes)]


@operator("npu_grouped_matmul.List", limits=_list_limits)
def grouped_matmul_by_list(
    x: Tensors,
    weight: Tensors,
    group_list: list[int] | None,
    split_item: int,
    group_type: None,
    group_list_type: int,
) -> Tensors:
    """One x in groups of rows that end at ``group_list``, for a list of matrices (S M S)."""
    if group_list is None or len(x) > 1:
        raise NotImplementedError(f"npusim: {_NAME} of {len(x)} tensors, group_list {group_list}")
    return [_rows(x[0], weight, _sizes(list(group_list), 0, x[0].shape[0]))]
