"""Write the completion of a command line as a script for a shell.

The scripts hold the words themselves, so that a tab answers at once and starts no Python. After an update of purld they
are written again, which a line in the shell's start file does by itself.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping

from purld.cli.completion_tree import SHELLS, CommandWords, CompletionTree


def write_bash(tree: CompletionTree) -> str:
    """Return the script for bash 3.2 and newer."""
    return _BASH % {
        "commands": " ".join(_first_words(tree)),
        "groups": "|".join(_groups(tree)) or "''",
        "cases": _bash_cases(tree),
        "keys": "\n".join(tree.keys),
        "values": "\n".join(f"    {key}) echo {' '.join(values)} ;;" for key, values in tree.keys.items() if values),
    }


def write_zsh(tree: CompletionTree) -> str:
    """Return the script for zsh, which has to have run compinit."""
    commands = [command for command in tree.commands if command.name not in _groups(tree)]
    return _ZSH % {
        "commands": " ".join(_first_words(tree)),
        "groups": _zsh_pairs({group: _inner_words(tree, group) for group in _groups(tree)}),
        "kinds": _zsh_pairs({command.name: command.arguments for command in commands}),
        "flags": _zsh_pairs({c.name: [name for flag in c.flags for name in flag.names] for c in commands}),
        "valued": _zsh_pairs({c.name: [n for f in c.flags if f.takes_value for n in f.names] for c in commands}),
        "listed": _zsh_pairs(
            {f"{c.name} {n}": f.values for c in commands for f in c.flags if f.values for n in f.names}
        ),
        "keys": " ".join(tree.keys),
        "values": _zsh_pairs({key: values for key, values in tree.keys.items() if values}),
    }


def _zsh_pairs(lists: Mapping[str, Iterable[str]]) -> str:
    """Return the keys and values of an associative array whose values are lists of words."""
    return "\n".join(f"  {shlex.quote(key)} {shlex.quote(' '.join(words))}" for key, words in lists.items())


def write_fish(tree: CompletionTree) -> str:
    """Return the script for fish 3 and newer."""
    lines = ["# completion of purld for fish", "complete -c purld -e", "complete -c purld -f"]
    lines.append("function __purld_keys\n    set -l token (commandline -ct)\n    switch $token")
    for key, values in tree.keys.items():
        if values:
            listed = " ".join(f"{key}={value}" for value in values)
            lines.append(f"        case '{key}=*'\n            printf '%s\\n' {listed}")
    keys = " ".join(f"{key}=" for key in tree.keys)
    lines.append(f"        case '*'\n            printf '%s\\n' {keys}\n    end\nend")
    for command in tree.commands:
        lines += _fish_command(command, tree)
    return "\n".join(lines) + "\n"


WRITERS: dict[str, Callable[[CompletionTree], str]] = {"bash": write_bash, "zsh": write_zsh, "fish": write_fish}
"""What writes the script of each shell."""


def _first_words(tree: CompletionTree) -> list[str]:
    return [*dict.fromkeys(command.name.split()[0] for command in tree.commands), "--version", "--help"]


def _groups(tree: CompletionTree) -> list[str]:
    """Return the words that a second word follows before there is a command."""
    return list(dict.fromkeys(command.name.split()[0] for command in tree.commands if " " in command.name))


def _inner_words(tree: CompletionTree, group: str) -> list[str]:
    return [command.name.split()[1] for command in tree.commands if command.name.startswith(f"{group} ")]


def _bash_cases(tree: CompletionTree) -> str:
    lines = []
    for group in _groups(tree):
        lines.append(f"    {shlex.quote(group)}) kinds='words'; words='{' '.join(_inner_words(tree, group))}' ;;")
    for command in tree.commands:
        if command.name in _groups(tree):
            continue
        flags = " ".join(name for flag in command.flags for name in flag.names)
        valued = "|".join(name for flag in command.flags if flag.takes_value for name in flag.names)
        listed = ";".join(f"{name}:{' '.join(f.values)}" for f in command.flags if f.values for name in f.names)
        lines.append(
            f"    {shlex.quote(command.name)}) kinds='{' '.join(command.arguments)}'; flags='{flags}'; "
            f"valued='|{valued}|'; listed=';{listed};' ;;"
        )
    return "\n".join(lines)


def _fish_command(command: CommandWords, tree: CompletionTree) -> list[str]:
    first, _, second = command.name.partition(" ")
    about = shlex.quote(command.help)
    if second:
        lines = [f"complete -c purld -n '__fish_seen_subcommand_from {first}' -a {second} -d {about}"]
    else:
        lines = [f"complete -c purld -n __fish_use_subcommand -a {first} -d {about}"]
    seen = f"-n '__fish_seen_subcommand_from {second or first}'"
    for flag in command.flags:
        names = " ".join(f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in flag.names)
        values = f" -x -a {shlex.quote(' '.join(flag.values))}" if flag.values else " -r -F" if flag.takes_value else ""
        lines.append(f"complete -c purld {seen} {names}{values} -d {shlex.quote(flag.help)}")
    if "keys" in command.arguments:
        lines.append(f"complete -c purld {seen} -a '(__purld_keys)'")
    if "shell" in command.arguments:
        lines.append(f"complete -c purld {seen} -a {shlex.quote(' '.join(SHELLS))}")
    if {"file", "folder"} & set(command.arguments):
        lines.append(f"complete -c purld {seen} -F")
    return lines


_BASH = r"""# completion of purld for bash
_purld_key_values() {
  case "$1" in
%(values)s
  esac
}

_purld_keys='%(keys)s'

_purld() {
  local line="${COMP_LINE:0:COMP_POINT}" cur prev word command='' kinds='' flags='' valued='' listed='' words='' kind=''
  local -a parts
  local count=0 index skip=0
  COMPREPLY=()
  # bash splits words at = and :, which keys and addresses hold; here they are split at blanks alone.
  read -r -a parts <<< "$line"
  case "$line" in *[[:space:]]) parts+=('') ;; esac
  cur="${parts[${#parts[@]}-1]}"
  prev=''
  for ((index = 1; index < ${#parts[@]} - 1; index++)); do
    word="${parts[index]}"
    prev="$word"
    if ((skip)); then skip=0; continue; fi
    case "$word" in
      -*) case "$valued" in *"|$word|"*) skip=1 ;; esac; continue ;;
    esac
    if [ -z "$command" ]; then
      command="$word"
    elif [ "$kinds" = words ]; then
      command="$command $word"
    else
      count=$((count + 1)); continue
    fi
    kinds=''; flags=''; valued=''; listed=''; words=''
    case "$command" in
%(cases)s
    esac
  done
  if [ -z "$command" ]; then
    COMPREPLY=($(compgen -W '%(commands)s' -- "$cur")); return
  fi
  if ((skip)); then
    case "$listed" in
      *";$prev:"*) words="${listed#*;$prev:}"; COMPREPLY=($(compgen -W "${words%%%%;*}" -- "$cur")) ;;
    esac
    return
  fi
  case "$cur" in -*) COMPREPLY=($(compgen -W "$flags" -- "$cur")); return ;; esac
  if [ "$kinds" = words ]; then COMPREPLY=($(compgen -W "$words" -- "$cur")); return; fi
  index=0
  for word in $kinds; do  # the last kind may be repeated
    kind="$word"
    if ((index == count)); then break; fi
    index=$((index + 1))
  done
  case "$kind" in
    shell) COMPREPLY=($(compgen -W 'bash zsh fish' -- "$cur")) ;;
    folder)
      COMPREPLY=($(compgen -d -- "$cur"))
      type compopt > /dev/null 2>&1 && compopt -o filenames 2> /dev/null ;;
    keys) _purld_complete_key "$cur" ;;
  esac
}

_purld_complete_key() {
  local cur="$1" key reply
  case "$cur" in
    *=*)
      key="${cur%%%%=*}"
      reply="$(compgen -W "$(_purld_key_values "$key")" -- "${cur#*=}")"
      # Where bash splits at =, only what comes after it is replaced.
      case "$COMP_WORDBREAKS" in
        *=*) COMPREPLY=($reply) ;;
        *) COMPREPLY=($(compgen -P "$key=" -W "$reply")) ;;
      esac ;;
    *.*) COMPREPLY=($(compgen -S = -W "$_purld_keys" -- "$cur")) ;;
    *) COMPREPLY=($(compgen -W "$(sed 's/\..*/./; /\.$/!s/$/=/' <<< "$_purld_keys" | sort -u)" -- "$cur")) ;;
  esac
  case "$cur" in
    *=*) ;;
    *) type compopt > /dev/null 2>&1 && compopt -o nospace 2> /dev/null ;;
  esac
}

complete -o bashdefault -o default -F _purld purld
"""

_ZSH = r"""#compdef purld
# completion of purld for zsh
typeset -gA _purld_groups _purld_kinds _purld_flags _purld_valued _purld_listed _purld_values
_purld_groups=(
%(groups)s
)
_purld_kinds=(
%(kinds)s
)
_purld_flags=(
%(flags)s
)
_purld_valued=(
%(valued)s
)
_purld_listed=(
%(listed)s
)
_purld_values=(
%(values)s
)
_purld_commands='%(commands)s'
_purld_keys='%(keys)s'

_purld() {
  local command='' word='' prev='' cur="${words[CURRENT]}" values=''
  local -i count=0 index skip=0
  local -a kinds
  for (( index = 2; index < CURRENT; index++ )); do
    word="${words[index]}"
    prev="$word"
    if (( skip )); then skip=0; continue; fi
    if [[ "$word" = -* ]]; then
      [[ " ${_purld_valued[$command]} " = *" $word "* ]] && skip=1
    elif [[ -z "$command" ]]; then command="$word"
    elif [[ -n "${_purld_groups[$command]}" ]]; then command="$command $word"
    else (( count++ ))
    fi
  done
  if [[ -z "$command" ]]; then compadd -- ${=_purld_commands}; return; fi
  if (( skip )); then
    values="${_purld_listed[$command $prev]}"
    if [[ -n "$values" ]]; then compadd -- ${=values}; else _files; fi
    return
  fi
  if [[ "$cur" = -* ]]; then compadd -- ${=_purld_flags[$command]}; return; fi
  if [[ -n "${_purld_groups[$command]}" ]]; then compadd -- ${=_purld_groups[$command]}; return; fi
  kinds=(${=_purld_kinds[$command]})
  case "${kinds[count+1]:-${kinds[-1]}}" in
    shell) compadd -- bash zsh fish ;;
    folder) _files -/ ;;
    keys) _purld_complete_key "$cur" ;;
    file) _files ;;
  esac
}

_purld_complete_key() {
  case "$1" in
    *=*)
      local values="${_purld_values[${1%%%%=*}]}"
      compset -P '*='
      compadd -- ${=values} ;;
    *.*) compadd -S '=' -- ${=_purld_keys} ;;
    *) compadd -S '' -- ${(u)${(M)${=_purld_keys}:#*.*}/.*/.} ${^${${=_purld_keys}:#*.*}}= ;;
  esac
}

if [ "${funcstack[1]}" = _purld ]; then _purld "$@"; else compdef _purld purld; fi
"""
