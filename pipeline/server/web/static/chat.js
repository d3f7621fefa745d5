// What needs no answer of the server: keys, scrolling, the tip of a cell, the menu of a phone.
const chat = {
  box: () => document.querySelector('.message textarea'),
  focus() {
    // On a phone the keyboard would cover the answer.
    if (matchMedia('(pointer: fine)').matches && !document.querySelector('.q-dialog')) chat.box()?.focus()
  },
  menu(open) { document.body.classList.toggle('menu-open', open) },
  near: true,
  follow() {
    const turns = document.querySelector('.turns')
    if (turns && chat.near) turns.scrollTop = turns.scrollHeight
  },
  show(number) {
    const turn = document.getElementById(`turn-${number}`)
    if (!turn) return
    chat.near = false
    turn.scrollIntoView({ block: 'start' })
    turn.classList.add('flash')
    setTimeout(() => turn.classList.remove('flash'), 1500)
  },
  tip(cell) {
    document.getElementById('tip')?.remove()
    if (!cell) return
    const tip = Object.assign(document.createElement('div'), { id: 'tip', textContent: cell.dataset.tip })
    document.body.append(tip)
    const at = cell.getBoundingClientRect()
    tip.style.top = `${at.bottom + 6}px`
    tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - tip.offsetWidth - 8))}px`
  },
}

document.addEventListener('keydown', (e) => {
  if (e.key !== 'Escape' || e.isComposing) return
  chat.tip()
  if (document.body.classList.contains('menu-open')) chat.menu(false)
  else if (document.querySelector('.stop:not(.hidden)')) emitEvent('chat_stop')
})
document.addEventListener('click', (e) => {
  const cell = e.target.closest('.cell'), link = e.target.closest('.words a')
  if (cell) { chat.show(cell.dataset.turn); chat.tip(cell) } else chat.tip()
  if (link) { e.preventDefault(); open(link.href, '_blank', 'noopener,noreferrer') }
  if (e.target.closest('.side .title, .side .new, .side .runs a')) chat.menu(false)
})
for (const kind of ['mouseover', 'focusin']) document.addEventListener(kind, (e) => chat.tip(e.target.closest?.('.cell')))
document.addEventListener('scroll', (e) => {
  const turns = e.target
  if (turns.classList?.contains('turns')) chat.near = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 80
}, true)
new MutationObserver(chat.follow).observe(document, { childList: true, subtree: true, characterData: true })
